"""RobustTok against its authors' numbers: tokenizer, perturbation, discriminator and the RAR generator."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.parity.cases import Case, assert_close, parametrize
from vistok.generators import robusttok as rar
from vistok.losses import dino
from vistok.losses.augment import diff_augment, fading_blur
from vistok.losses.representation import ViTTeacher
from vistok.quantize.perturbation import neighbours, perturb
from vistok.quantize.rotation import straight_through
from vistok.sampling.tokens import probabilities
from vistok.tokenizers.robusttok import Perturbation, RobustTok, configure, key_table, recognise


def build(case: Case) -> RobustTok:
    model = RobustTok(configure(case.config))
    model.load_state_dict(key_table(model.config).to_ours(case.weights))
    return model.eval()


@parametrize("robusttok", kinds=("tokenizer",))
def test_tokenizer(case: Case) -> None:
    model, io = build(case), case.io
    pixels = (io["image"] + 1) / 2
    with torch.no_grad():
        latent = model.encoder(pixels)
        assert_close(model.encoder.tokens(pixels), io["encoder_tokens"], name="encoder_tokens")
        assert_close(latent, io["encoder_latent"], name="encoder_latent")
        tokens = model.encode(pixels)
        assert_close(tokens.codes, io["codes"], name="codes")
        vectors = model.arrange(model.quantizer.decode(tokens.codes), model.spec)
        assert_close(vectors, io["quantized"], name="quantized")
        assert_close(model.decoder(io["quantized"]) * 2 - 1, io["reconstruction"], name="reconstruction")
        shown = (io["reconstruction_clamped"] + 1) / 2
        assert_close(model.decode(tokens), shown, name="decode(encode)", scale=1)


@parametrize("robusttok", kinds=("tokenizer",))
def test_training_terms(case: Case) -> None:
    model, io = build(case).train(), case.io
    teacher = ViTTeacher.from_state(case.weights, "semantic_model.", heads=model.config.vit.heads)
    pixels = (io["image"] + 1) / 2
    assert_close(teacher(pixels), io["semantic_feature"], name="semantic_feature")
    model.teach(teacher)
    model.hits.zero_()
    terms = model.loss({"pixels": pixels}, 0, torch.Generator())
    assert_close(terms["codebook"], io["train_vq_loss"], name="train_vq_loss")
    assert_close(terms["commitment"], io["train_commit_loss"], name="train_commit_loss")
    assert_close(terms["semantic"], io["train_semantic_loss"], name="train_semantic_loss")
    assert_close(terms["reconstruction"], (io["reconstruction"] - io["image"]).square().mean(), name="reconstruction")
    assert_close(model.hits, io["ema_vocab_hit_after"], name="ema_vocab_hit_after")
    usage = 100 * model.code_usage(io["codes"].numel())
    assert_close(torch.tensor(usage), io["train_usage_percent"], name="train_usage_percent")


@parametrize("robusttok", kinds=("tokenizer",))
def test_checkpoint_there_and_back(case: Case) -> None:
    model = build(case)
    back = key_table(model.config).to_theirs(model.state_dict())
    theirs = {key: value for key, value in case.weights.items() if not key.startswith("semantic_model.")}
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)
    seen = recognise(case.weights)
    assert seen is not None
    heads = replace(seen.vit, heads=model.config.vit.heads)
    assert (heads, seen.codebook_size, seen.code_dim) == (
        model.config.vit,
        model.config.codebook_size,
        model.config.code_dim,
    )


@parametrize("robusttok", kinds=("perturbation",))
def test_perturbation(case: Case) -> None:
    io, config = case.io, case.config
    table, z = case.weights["codebook.weight"], io["z"].requires_grad_()
    rows = z.flatten(2).transpose(1, 2)
    if config["codebook_norm"]:
        table, rows = F.normalize(table, dim=1), F.normalize(rows, dim=2)
    flat = rows.detach().flatten(0, 1)
    assert_close(neighbours(flat, table, config["delta"]), io["neighbours"], name="neighbours")
    shape = rows.shape[:2]
    codes = perturb(
        rows,
        table,
        io["codes_clean"].flatten(1),
        rate=config["alpha"],
        strength=config["delta"],
        chance=io["random_prob"].view(shape),
        rank=io["random_idx"].view(shape),
    )
    assert_close(codes, io["perturbed_codes_all_images"].flatten(1), name="codes")
    count = int(len(z) * config["beta"])
    assert count == config["images_perturbed"]
    moved = straight_through(rows, table[codes]).transpose(1, 2).unflatten(2, z.shape[2:])
    output = torch.cat([moved[:count], io["z_q_clean"][count:]])
    assert_close(output, io["output"], name="output")
    (output * io["grad_weight"]).sum().backward()
    assert_close(z.grad, io["grad_z"], name="grad_z")


@parametrize("robusttok", kinds=("tokenizer",))
def test_the_models_own_perturbation_follows_the_same_rule(case: Case) -> None:
    """`RobustTok.perturbed` on its own draws gives what the function gives, for the first images alone."""
    model, io = build(case), case.io
    model.config = replace(model.config, perturbation=Perturbation(rate=0.7, share=0.5, strength=9))
    latent = io["encoder_latent"].flatten(2).transpose(1, 2)
    quantized = model.quantizer(latent)
    vectors = model.perturbed(latent, quantized, 0, torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    chance = torch.rand(quantized.codes.shape, generator=rng)
    rank = torch.randint(9, quantized.codes.shape, generator=rng)
    codes = perturb(
        model.compared(latent), model.quantizer.table(), quantized.codes, rate=0.7, strength=9, chance=chance, rank=rank
    )
    assert (codes != quantized.codes).float().mean() > 0.4
    codes[1:] = quantized.codes[1:]
    assert_close(vectors, model.quantizer.decode(codes), name="vectors")


# -- RAR -------------------------------------------------------------------------------------------------------------


def build_rar(case: Case) -> rar.RAR:
    model = rar.RAR(rar.configure(case.config))
    model.load_state_dict(rar.key_table(model.config).to_ours(case.weights))
    return model.eval()


@parametrize("robusttok", kinds=("rar",))
def test_rar_logits(case: Case) -> None:
    model, io = build_rar(case), case.io
    assert torch.equal(io["condition_ids"], io["class_labels"] + model.config.codebook_size + 1)
    with torch.no_grad():
        assert_close(model.logits(io["input_ids"], io["class_labels"]), io["logits_raster"], name="logits_raster")
        shuffled = io["input_ids"].gather(1, io["orders"])
        assert_close(shuffled, io["labels_permuted"], name="labels_permuted")
        logits = model.logits(shuffled, io["class_labels"], io["orders"])
    assert_close(logits, io["logits_permuted"], name="logits_permuted")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), shuffled.flatten())
    assert_close(loss, io["cross_entropy_permuted"], name="cross_entropy_permuted")


@parametrize("robusttok", kinds=("rar",))
def test_rar_generates(case: Case, monkeypatch) -> None:
    """Greedy codes, and the probabilities at every step, guided by the growing scale and without guidance."""
    model, io = build_rar(case), case.io
    seen: list[torch.Tensor] = []

    def likeliest(logits, uniform, sampling):
        seen.append(probabilities(logits, sampling))
        return logits.argmax(-1)

    monkeypatch.setattr(rar, "draw", likeliest)
    for kind, options in (("guided", {}), ("unguided", {"guidance": 1.0, "temperature": 1.0})):
        seen.clear()
        tokens = model.generate(io["class_labels"], **options)
        assert_close(tokens.codes, io[f"generated_{kind}_greedy"], name=kind)
        assert_close(torch.stack(seen, 1), io[f"probs_{kind}"], name=f"probs_{kind}")


@parametrize("robusttok", kinds=("rar",))
def test_rar_checkpoint_there_and_back(case: Case) -> None:
    model = build_rar(case)
    back = rar.key_table(model.config).to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], case.weights[key]) for key in back)
    seen = rar.recognise(case.weights)
    told = model.config
    assert seen == replace(
        told, guidance=seen.guidance, power=seen.power, temperature=seen.temperature, tokenizer=seen.tokenizer
    )


# -- the discriminator -----------------------------------------------------------------------------------------------


@parametrize("robusttok", kinds=("dino-disc",))
def test_discriminator(case: Case) -> None:
    io, config = case.io, case.config
    judge = dino.DinoDiscriminator(
        weights="random",
        image=config["frozen_input"],
        patch=config["patch"],
        vit_width=config["embed_dim"],
        depth=config["depth"],
        heads=config["heads"],
        taps=config["key_depths"],
        kernel=config["kernel"],
        range=(-1, 1),
    ).eval()
    theirs = case.weights
    judge.vit.load({key[5:]: value for key, value in theirs.items() if key.startswith("dino.")})
    heads = {key: value for key, value in theirs.items() if key.startswith("heads.")}
    judge.load_state_dict(dino.head_keys().to_ours(heads))
    pixels = ((io["image"] + 1) / 2).requires_grad_()
    logits = judge(pixels)
    assert_close(logits, io["logits"], name="logits")
    for depth, found in enumerate(judge.features(io["image"])):
        assert_close(found[:, :, : io[f"act{depth}_first8"].shape[-1]], io[f"act{depth}_first8"], name=f"depth {depth}")
    (-logits.mean()).backward()
    assert_close(pixels.grad / 2, io["grad_image_of_neg_mean"], name="gradient")  # of pixels in [0, 1]: twice as steep
    augmented = diff_augment(
        io["image"], config["aug_prob"], config["cutout"], groups=io["aug_uniform_flags"], draws=io["aug_uniforms"]
    )
    assert_close(augmented, io["augmented"], name="augmented")
    assert_close(fading_blur(io["image"], 0.25), io["blurred_0_25"], name="blurred")
