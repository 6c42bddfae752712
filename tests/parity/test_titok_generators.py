"""TiTok's generators against their authors' numbers: both masked transformers, and MaskGen on codes and on vectors."""

from dataclasses import replace

import torch

from tests.parity.cases import Case, assert_all_close, assert_close, parametrize
from vistok.generators import _titok_networks as networks
from vistok.generators._titok_keys import class_sampling
from vistok.generators.titok import TiTokGenerator, _guided_head, configure, key_table, recognise
from vistok.hub import fill
from vistok.nn.clip_text import TextFeatures
from vistok.sampling.masked import StoredDraws, gumbel, sample_masked
from vistok.sampling.masking import mask_exactly, masking_ratio
from vistok.sampling.tokens import guide


def build(case: Case) -> TiTokGenerator:
    """The model of the case's config with its weights: every key used, none missing, and back out as they came."""
    plain = case.config
    config = configure(plain)
    if config.network == "mmdit":
        config = replace(config, text=tuple(case.io["text"].shape[1:]))
    seen = recognise(case.weights)
    assert seen is not None
    shapes = ("network", "latent", "width", "depth", "tokens")
    assert [getattr(seen, name) for name in shapes] == [getattr(config, name) for name in shapes]
    model = TiTokGenerator(config)
    table = key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(value, case.weights[key]) for key, value in back.items())
    return model.eval()


def generate(model: TiTokGenerator, settings: dict, labels, uniform_codes, uniform_confidence):
    """The authors' `generate` of one setting with its stored uniform numbers, and the codes that each step saw."""
    sampling = class_sampling(
        settings["num_sample_steps"],
        settings["guidance_scale"],
        settings["guidance_decay"],
        settings["randomize_temperature"],
        power=settings.get("guidance_scale_pow", 3.0),
        annealing=settings.get("softmax_temperature_annealing", False),
    )
    seen = []

    def network(codes, guided):
        seen.append(codes)
        null = torch.full_like(labels, model.null)
        if not guided:
            return model.network(codes, labels)
        return model.network(codes.repeat(2, 1), torch.cat([labels, null]))

    start = torch.full(uniform_confidence.shape[1:], model.mask_id)
    draws = StoredDraws(gumbel(uniform_codes), gumbel(uniform_confidence))
    return sample_masked(network, start, model.mask_id, sampling, draws), torch.stack(seen)


def accuracy(logits, targets, masked):
    """Mean over items of the share of masked codes that are the likeliest."""
    right = (logits.argmax(-1) == targets) & masked
    return (right.sum(1) / (masked.sum(1) + 1e-8)).mean()


@parametrize("titok", kinds=("maskgit",))
def test_class_generators(case: Case) -> None:
    io, model = case.io, build(case)
    labels = io["condition"]
    with torch.no_grad():
        actual = {
            "logits_cond": model.network(io["input_ids"], labels),
            "logits_uncond": model.network(io["input_ids"], torch.full_like(labels, model.null)),
        }
        ratio = masking_ratio(io["train_timesteps"])
        # their score of a position is its place in the sorted draws, ours its rank: the inverse permutation
        order = io["train_perm_u"].argsort(1)
        masked = mask_exactly(order.float(), ratio)
        assert torch.equal(masked, io["train_masks"].bool())
        seen = torch.where(masked, model.mask_id, io["train_targets"])
        assert_close(seen, io["train_masked"], name="train_masked")
        actual["train_logits"] = model.network(seen, labels)
        batch = {"codes": io["train_targets"], "label": labels, "masked": masked}
        actual["train_loss"] = model.loss(batch, 0, torch.Generator())["cross_entropy"]
        actual["train_correct_tokens"] = accuracy(actual["train_logits"], io["train_targets"], masked)
        for number, settings in enumerate(case.config["generations"]):
            steps = range(settings["num_sample_steps"])
            of_codes = torch.stack([io[f"gen{number}_u_logits_{step}"] for step in steps])
            of_confidence = torch.stack([io[f"gen{number}_u_conf_{step}"] for step in steps])
            actual[f"gen{number}_tokens"], _ = generate(model, settings, labels, of_codes, of_confidence)
    assert_all_close(actual, io)


@parametrize("maskgit", kinds=("titok-bert", "titok-uvit"))
def test_class_generators_of_maskgits_cases(case: Case) -> None:
    io, model = case.io, build(case)
    assert model.mask_id == case.config["mask_id"]
    labels, masked = io["class_labels"], io["mask"]
    with torch.no_grad():
        logits = model.network(io["input_ids"], labels)
        batch = {"codes": io["codes"], "label": labels, "masked": masked}
        codes, inputs = generate(
            model,
            case.config["decode"],
            io["decode_labels"],
            io["decode_uniform_logits"],
            io["decode_uniform_confidence"],
        )
        actual = {
            "logits_cond": logits,
            "logits_uncond": model.network(io["input_ids"], torch.full_like(labels, model.null)),
            "mlm_loss": model.loss(batch, 0, torch.Generator())["cross_entropy"],
            "correct_tokens": accuracy(logits, io["codes"], masked),
            "decode_inputs": inputs,
            "decode_codes": codes,
        }
    assert torch.equal(torch.where(masked, model.mask_id, io["codes"]), io["input_ids"])
    assert_all_close(actual, io)


def features_of(io) -> TextFeatures:
    return TextFeatures(io["text"], io["text_pooled"][:, 0])


@parametrize("titok", kinds=("maskgen",))
def test_maskgen(case: Case) -> None:
    io, model = case.io, build(case)
    with torch.no_grad():
        scores, width = io.get("aesthetic_score"), model.config.aesthetic
        read = model.read(features_of(io), scores)
        if width:
            embed = networks.falling_sinusoid if model.config.latent == "vq" else networks.paired_sinusoid
            assert_close(embed(scores, width), io["aesthetic_embedding"], name="aesthetic_embedding")
        if "condition_vector" in io:
            assert_close(read.vector[:, None], io["condition_vector"], name="condition_vector")
        if model.config.latent == "vq":
            assert_close(model.network(io["input_ids"], read), io["logits"], name="logits")
        else:
            check_vectors(model, io, read, case.config["official_config"]["losses"])


def check_vectors(model: TiTokGenerator, io, read, losses) -> None:
    """MaskGen-KL: the trunk, the head with and without guidance, its training terms, and its sampling."""
    masked, head = io["mask"].bool(), model.network.head
    trunk = model.network(io["latents"], masked, read)
    assert_close(trunk, io["trunk_output"], name="trunk_output")
    plain = head(io["head_x"], io["head_t"], io["head_condition"])
    assert_close(torch.cat(plain, -1), io["head_output"], name="head_output")
    scale = 3.0
    guided = both_halves(head, io["head_condition"], scale)(io["head_x"], io["head_t"])
    assert_close(torch.cat(guided, -1), io["head_output_cfg"], name="head_output_cfg")

    z = io["trunk_output"].flatten(0, 1)
    targets = io["latents"].flatten(0, 1)
    found = model.diffusion.terms(lambda x, t: head(x, t, z), targets, io["diff_noise"], io["diff_t"])
    assert_close(found.squared_error, io["diff_mse"], name="diff_mse")
    assert_close(found.bound, io["diff_vb"], name="diff_vb")
    assert_close(sum(found), io["diff_loss_per_token"], name="diff_loss_per_token")

    schedule = model.diffusion.respaced(int(losses["num_sampling_steps"]))
    noise, start, condition = io["head_sample_noise"], io["head_sample_init"], io["head_sample_condition"]
    whole = schedule.sample(both_halves(head, condition, 2.5), start.repeat(2, 1), lambda index: noise[index])
    assert_close(whole, io["head_sample"], name="head_sample")
    half = len(start)
    kept = _guided_head(model.network, condition, torch.full((half,), 2.5))
    ours = schedule.sample(kept, start, lambda index: noise[index, :half])
    assert_close(ours, io["head_sample"][:half], name="head_sample, the half that is kept")


def both_halves(head, z, scale):
    """The authors' guidance on a doubled batch: both halves see the first one's x, each keeps its own variance."""

    def answer(x, t):
        noise, v = head(x[: len(x) // 2].repeat(2, 1), t, z)
        return guide(noise, scale).repeat(2, 1), v

    return answer
