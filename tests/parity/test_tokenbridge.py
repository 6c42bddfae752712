"""TokenBridge against its authors' numbers: rounding, the narrowed KL-16, and the generator with its decodes."""

import torch

from tests.parity.cases import Case, assert_all_close, assert_close, parametrize
from vistok.generators import tokenbridge as generator
from vistok.generators.tokenbridge import TokenBridgeGenerator, _gather, _others
from vistok.hub import fill
from vistok.quantize.normal import NormalLevels, normal_levels
from vistok.tokenizers import tokenbridge as tokenizer
from vistok.tokenizers.tokenbridge import TokenBridge


def as_rows(latent):
    return latent.flatten(2).transpose(1, 2)


def as_map(rows, like):
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


@parametrize("tokenbridge", kinds=("ptq",))
def test_rounding(case: Case) -> None:
    io = case.io
    for setting in case.config["settings"]:
        name = setting["name"]
        levels = NormalLevels(setting["bits"], setting["min"], setting["max"], setting["std_range"])
        codes = levels.encode(io["x"])
        actual = {
            "indices": codes,
            "dequantized": levels.decode(codes),
            "level_values": levels.levels(),
            "boundaries": normal_levels(2 ** setting["bits"], setting["std_range"])[1],
        }
        assert_all_close({f"{name}_{key}": value for key, value in actual.items()}, io)


@parametrize("tokenbridge", kinds=("kl16",))
def test_kl16(case: Case) -> None:
    io, config = case.io, tokenizer.configure(case.config)
    seen = tokenizer.recognise(case.weights)
    assert seen is not None
    assert (seen.cnn, seen.encoder_attention) == (config.cnn, config.encoder_attention)
    model = TokenBridge(config)
    table = tokenizer.key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in case.weights.items())
    model.eval()
    size = tuple(io["image"].shape[-2:])
    with torch.no_grad():
        moments = model.encoder((io["image"] + 1) / 2)
        mean, log_variance = model.gaussian.moments(as_rows(moments))
        drawn = mean + torch.exp(log_variance / 2) * as_rows(io["noise"])
        codes = model.quantizer.encode(as_rows(io["sample"]))
        levels = model.quantizer.levels.decode(codes)
        rounded = model.quantizer.decode(codes)
        divergence = torch.stack([model.gaussian(one[None]).losses["kl"] for one in as_rows(moments)])
        actual = {
            "moments": moments,
            "mean": as_map(mean, io["mean"]),
            "logvar": as_map(log_variance, io["mean"]),
            "sample": as_map(drawn, io["sample"]),
            "kl": divergence,
            "quant_indices": as_map(codes, io["sample"]),
            "dequantized_scaled": as_map(levels, io["sample"]),
            "reconstruction_from_mean": model.reconstruct(mean, size) * 2 - 1,
            "reconstruction_quantized": model.reconstruct(rounded, size) * 2 - 1,
        }
    assert_all_close(actual, io)
    tokens = model.encode((io["image"] + 1) / 2)
    assert torch.equal(tokens.codes, model.quantizer.encode(mean))
    assert_close(model.decode(tokens), model((io["image"] + 1) / 2).clamp(0, 1), name="decode", rtol_of_scale=1e-4)


def build(case: Case) -> TokenBridgeGenerator:
    config = generator.configure(case.config)
    seen = generator.recognise(case.weights)
    assert seen is not None
    assert (seen.width, seen.depth, seen.head_depth, seen.bits, seen.buffer, seen.classes) == (
        config.width,
        config.depth,
        config.head_depth,
        config.bits,
        config.buffer,
        config.classes,
    )
    model = TokenBridgeGenerator(config)
    table = generator.key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert torch.equal(back.pop("channel_mask"), case.weights["channel_mask"])
    tables = {key: back.pop(key) for key in ("reconstruction_values", "boundaries")}
    assert_all_close(tables, case.weights)
    assert all(torch.equal(value, case.weights[key]) for key, value in back.items())
    return model.eval()


@parametrize("tokenbridge", kinds=("generator",))
def test_generator_teacher_forced(case: Case) -> None:
    io, model = case.io, build(case)
    codes = model.levels.encode(as_rows(io["latent"]))
    masked = io["orders"][:, : case.config["masked"]].sort(1).values  # the authors' logits are in raster order
    visible = _others(masked, codes.shape[1])
    assert torch.equal(visible, (io["mask"] == 0).nonzero()[:, 1].unflatten(0, visible.shape))
    with torch.no_grad():
        encoded = model.encode(codes, visible, model.class_vectors(io["labels"]))
        actual = {
            "quant_indices": codes,
            "quant_values": model.levels.decode(codes),
            "targets_reordered": codes[..., list(model.config.order)],
            "encoder_out": encoded,
            "decoder_out": model.decode(encoded, visible),
            "channel_logits": model.logits(codes, masked, io["labels"]).flatten(0, 1),
        }
        batch = {"codes": codes, "label": io["labels"], "masked": masked}
        actual["loss"] = model.loss(batch, 0, torch.Generator())["cross_entropy"]
    assert_all_close(actual, io)
    assert torch.equal(_gather(codes, masked).flatten(0, 1), codes[io["mask"].bool()])


@parametrize("tokenbridge", kinds=("generator",))
def test_generator_decodes(case: Case) -> None:
    io, model, cfg = case.io, build(case), case.config["cfg"]
    for name, options in {
        "nocfg": {"guidance": 1.0},
        "cfg_linear": {"guidance": cfg, "schedule": "linear"},
        "cfg_constant": {"guidance": cfg, "schedule": "constant"},
    }.items():
        tokens = model.generate(io["labels"], temperature=0, orders=io["orders"], **options)
        latent = model.levels.decode(tokens.codes)
        actual = {f"generated_{name}": as_map(latent, io["latent"]), f"generated_{name}_indices": tokens.codes}
        assert_all_close(actual, io)
