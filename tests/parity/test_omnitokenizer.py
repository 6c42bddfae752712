"""OmniTokenizer against its authors' numbers: pictures and clips at every stage, losses, inflation, language model."""

from dataclasses import replace
from math import isqrt

import torch

from tests.parity.cases import Case, assert_close, parametrize
from vistok.generators.omnitokenizer import OmniLM, OmniLMConfig
from vistok.generators.omnitokenizer import key_table as lm_keys
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.discriminators import build_discriminator
from vistok.losses.patchgan import omnitokenizer_keys
from vistok.sampling.tokens import Sampling, probabilities
from vistok.tokenizers._omnitokenizer_keys import fields_of_state, inflate, inflate_kernel
from vistok.tokenizers.omnitokenizer import OmniTokenizer, as_clip, configure, key_table


def load(case: Case) -> OmniTokenizer:
    """The model with the case's weights: every key used, none missing."""
    args, biased = case.config["official_args"], case.config["attention_bias_added"]
    config = replace(configure(args), biased=biased, window=1 + 4 * args["temporal_patch_size"])
    model = OmniTokenizer(config)
    model.load_state_dict(key_table(config).to_ours(case.weights))
    return model.eval()


@parametrize("omnitokenizer", kinds=("tokenizer",))
def test_stages(case: Case) -> None:
    model, io = load(case), case.io
    with torch.no_grad():
        for kind in ("image", "clip"):
            pixels = io[f"{kind}_input"] + 0.5
            clip = as_clip(pixels)
            space = model.encoder.space(model.encoder.patches(clip))
            time = model.encoder.time(space)
            assert_close(space.flatten(0, 1).flatten(1, 2), io[f"{kind}_enc_spatial_out"], name=f"{kind} space")
            sequences = time.permute(0, 2, 3, 1, 4).flatten(0, 2)
            assert_close(sequences, io[f"{kind}_enc_temporal_out"], name=f"{kind} time")
            assert_close(time.permute(0, 4, 1, 2, 3), io[f"{kind}_encoder_out"], name=f"{kind} encoder")
            assert_close(
                model.encoder.project(time).permute(0, 4, 1, 2, 3), io[f"{kind}_pre_vq"], name=f"{kind} pre_vq"
            )
            latent = model.encoder(clip).flatten(1, 3)
            out = model.quantizer(latent)
            if f"{kind}_codes" in io:
                vectors = io[f"{kind}_quantized"].permute(0, 2, 3, 4, 1)
                assert_close(out.codes.view_as(io[f"{kind}_codes"]), io[f"{kind}_codes"], name=f"{kind} codes")
                assert_close(
                    model.encode(pixels.clamp(0, 1)).codes, io[f"{kind}_codes"].flatten(1), name=f"{kind} encode"
                )
                assert_close(out.vectors.view_as(vectors), vectors, name=f"{kind} quantized")
                assert_close(out.losses["commitment"].reshape(1), io[f"{kind}_commitment_loss"], name="commitment")
                expected = io[f"{kind}_reconstruction"]
            else:
                mean, log_variance = model.quantizer.moments(latent)
                vectors = io[f"{kind}_mean"].permute(0, 2, 3, 4, 1)
                assert_close(mean.view_as(vectors), vectors, name=f"{kind} mean")
                expected = io[f"{kind}_logvar"].permute(0, 2, 3, 4, 1)
                assert_close(log_variance.view_as(expected), expected, name=f"{kind} logvar")
                total = io[f"{kind}_kl"].sum() / len(clip)
                assert_close(out.stats["kl"], total, name=f"{kind} kl")
                expected = io[f"{kind}_reconstruction_from_mean"]
            middle = model.decoder.time(model.decoder.project(vectors))
            sequences = middle.permute(0, 2, 3, 1, 4).flatten(0, 2)
            assert_close(sequences, io[f"{kind}_dec_temporal_out"], name=f"{kind} decoder time")
            space = model.decoder.space(middle)
            assert_close(space.flatten(0, 1).flatten(1, 2), io[f"{kind}_dec_spatial_out"], name=f"{kind} decoder space")
            rebuilt = model.decoder(vectors)
            rebuilt = rebuilt if kind == "clip" else rebuilt[:, :, 0]
            assert_close(rebuilt - 0.5, expected, name=f"{kind} reconstruction")
            if f"{kind}_codes" in io:
                decoded = model.decode(model.encode(pixels.clamp(0, 1)))
                assert_close(decoded, (expected + 0.5).clamp(0, 1), name=f"{kind} decode(encode)", scale=1)


@parametrize("omnitokenizer", kinds=("tokenizer",))
def test_released_clips_are_not_causal(case: Case) -> None:
    """The probe: mirroring the last patch of frames changes the latent of every frame, as the released code does."""
    model, io = load(case), case.io
    clip = io["clip_input"] + 0.5
    mirrored = clip.clone()
    mirrored[:, :, -model.config.frames :] = mirrored[:, :, -model.config.frames :].flip(-1)
    with torch.no_grad():
        states = [model.encoder.time(model.encoder.space(model.encoder.patches(one))) for one in (clip, mirrored)]
    change = (states[0] - states[1]).abs().amax((0, 2, 3, 4))
    assert_close(change, io["probe_change_per_latent_frame"], rtol_of_scale=1e-4, name="probe_change_per_latent_frame")
    causal = OmniTokenizer(replace(model.config, scrambled=False)).eval()
    causal.load_state_dict(model.state_dict())
    with torch.no_grad():
        states = [causal.encoder.time(causal.encoder.space(causal.encoder.patches(one))) for one in (clip, mirrored)]
    change = (states[0] - states[1]).abs().amax((0, 2, 3, 4))
    assert change[:-1].max() == 0
    assert change[-1] > 0


@parametrize("omnitokenizer", kinds=("tokenizer",))
def test_codebook_update(case: Case) -> None:
    if "ema_input" not in case.io:
        return
    model, io = load(case), case.io
    model.quantizer.train()
    model.quantizer(io["ema_input"].permute(0, 2, 3, 4, 1).flatten(1, 3))
    for ours, theirs in (("counts", "N"), ("sums", "z_avg"), ("codebook", "embeddings")):
        assert_close(getattr(model.quantizer, ours), io[f"ema_after_{theirs}"], name=f"ema_after_{theirs}")


@parametrize("omnitokenizer", kinds=("tokenizer",))
def test_losses(case: Case) -> None:
    """Terms of pictures and clips with both discriminators, in evaluation mode, as the authors compute them."""
    io = case.io
    if "loss_image_recon" not in io:
        return
    model, args = load(case), case.config["official_args"]
    judges = {}
    for kind in ("image", "video"):
        net = build_discriminator(f"omnitokenizer-{kind}", width=args["disc_channels"], layers=args["disc_layers"])
        prefix = f"{kind}_discriminator."
        table = omnitokenizer_keys(args["disc_layers"])
        weights = {key.removeprefix(prefix): value for key, value in case.weights.items() if key.startswith(prefix)}
        weights.setdefault("noise.weight", torch.zeros(3))
        net.load_state_dict(table.to_ours(weights), strict=False)
        weight = args[f"{kind}_gan_weight"]
        judges[kind] = AdversarialLoss(net, kind="hinge", weight=weight, adaptive=False, scales_both=True).eval()
        pixels = io["image_input"] if kind == "image" else io["clip_input"]
        assert_close(net(pixels + 0.5), io[f"disc_{kind}_logits"], name=f"disc_{kind}_logits")
    model.judge(judges["image"], None, judges["video"])
    for kind in ("image", "clip"):
        clip = as_clip(io[f"{kind}_input"] + 0.5)
        with torch.no_grad():
            rebuilt, _ = model.rebuild(clip)
            recon = 4 * (rebuilt - clip).abs().mean()
            rows = torch.arange(len(clip))
            frames = io["loss_clip_frame_index"] if kind == "clip" else torch.zeros(len(clip), dtype=torch.long)
            pair = clip[rows, :, frames], rebuilt[rows, :, frames]
            terms = model._adversaries({"reconstruction": recon}, pair, (clip, rebuilt), 0)
            batch = {"judged": pair, "judged_clips": (clip, rebuilt)}
            judged = model.discriminator_loss(batch, 0)
        assert_close(recon.reshape(1), io[f"loss_{kind}_recon"], name=f"{kind} recon")
        adversarial = sum(value for name, value in terms.items() if name != "matching")
        assert_close(adversarial.reshape(1), io[f"loss_{kind}_adversarial"], name=f"{kind} adversarial")
        assert_close(terms["matching"].reshape(1), io[f"loss_{kind}_feature_matching"], name=f"{kind} matching")
        assert_close(judged.reshape(1), io[f"loss_{kind}_discriminator"], name=f"{kind} discriminator")


@parametrize("omnitokenizer", kinds=("tokenizer",))
def test_sizes_are_seen_in_the_weights(case: Case) -> None:
    model = load(case)
    seen = fields_of_state(case.weights)
    assert seen is not None
    for name, value in seen.items():
        if name != "resizes":
            assert getattr(model.config, name) == value, name
    back = key_table(model.config).to_theirs(model.state_dict())
    theirs = {key: value for key, value in case.weights.items() if "discriminator" not in key}
    assert back.keys() == theirs.keys()
    unused = ("context_norm", "spatial_rel_pos_bias", "codebook_usage") + ("codebook",) * (model.config.latent == "kl")
    assert all(torch.equal(back[key], theirs[key]) for key in back if not any(part in key for part in unused))


@parametrize("omnitokenizer", kinds=("inflate",))
def test_inflation(case: Case) -> None:
    io, frames = case.io, case.config["plain"]["temporal_patch"]
    checked = 0
    for strategy in {key.split(":")[0] for key in io if not key.startswith("dis_")}:
        for name, tensor in inflate(case.weights, frames, strategy).items():
            assert_close(tensor, io[f"{strategy}:{name}"], name=f"{strategy}:{name}")
            checked += 1
    for key, expected in io.items():
        if key.startswith("dis_"):
            strategy, name = key.removeprefix("dis_").split(":")
            source = case.weights[name.replace("video_", "image_")]
            depth = expected.shape[2] if expected.ndim == 5 else 1
            assert_close(inflate_kernel(source, depth, strategy), expected, name=key)
            checked += 1
    assert checked == len(io)


@parametrize("omnitokenizer", kinds=("lm",))
def test_language_model(case: Case) -> None:
    plain, io = case.config["plain"], case.io
    config = OmniLMConfig(
        plain["width"],
        plain["layers"],
        plain["heads"],
        plain["codebook_size"],
        grid=(isqrt(io["codes"].shape[1]),) * 2,
        classes=plain["n_class"],
        class_first=plain["class_first"],
        positions=plain["block_size"],
    )
    model = OmniLM(config).eval()
    table = lm_keys(config)
    model.load_state_dict(table.to_ours(case.weights))
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], case.weights[key]) for key in back)
    codes, labels = io["codes"], io["class_labels"]
    with torch.no_grad():
        logits = model.logits(codes, labels)
        assert_close(logits, io["logits"], name="logits")
        assert_close(codes + config.offset, io["target_ids"], name="target_ids")
        term = model.loss({"codes": codes, "label": labels}, 0, torch.Generator())["cross_entropy"]
        assert_close(term.reshape(1), io["cross_entropy"], name="cross_entropy")
        greedy = Sampling(guidance=1 + plain["cfg_ratio"], temperature=0.0)
        for ramp, name in ((False, "greedy_cfg_const"), (True, "greedy_cfg_ramp")):
            found = model.sample(labels, seeds=[0] * len(labels), sampling=greedy, known=None, ramp=ramp, visual=False)
            assert_close(found + config.offset, io[name], name=name)
    expected = io["filter_output"].masked_fill(io["filter_output"] < -1e29, -torch.inf).softmax(-1)
    found = probabilities(io["filter_input"], Sampling(top_k=9, top_p=0.8))
    assert_close(found, expected, name="filter_output")
