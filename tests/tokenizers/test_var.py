"""VAR's tokenizer: scales, prefixes, training, conventions of its config, and checkpoints through `convert`."""

import pytest
import torch
import yaml

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError, InputError, MismatchError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.patchgan import PatchDiscriminator
from vistok.tokenizers.var import VARTokenizerConfig, configure, key_table, recognise


@pytest.fixture(params=["var-tiny", "var-tiny-cosine"])
def model(request):
    torch.manual_seed(0)
    model = vistok.create(request.param)
    draw_weights(model)
    return model


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_scales_are_segments_and_their_prefixes_decode(model, pixels):
    tokens = model.encode(pixels)
    scales = model.config.scales
    assert [segment.shape for segment in tokens.segments] == [(side, side) for side in scales]
    assert tokens["scale_3"].shape == (4, scales[2], scales[2])
    assert model.spec.prefixes[:2] == (1, 1 + scales[1] ** 2)
    pictures = [model.decode(tokens.prefix(length)) for length in model.spec.prefixes]
    assert all(picture.shape == pixels.shape for picture in pictures)
    assert torch.equal(pictures[-1], model.decode(tokens))
    assert len({float(picture.sum()) for picture in pictures}) == len(scales)
    with pytest.raises(InputError, match="6 tokens do not decode"):
        model.decode(tokens.prefix(6))
    again = vistok.Tokens.from_bytes(tokens.to_bytes())
    assert torch.equal(again.codes, tokens.codes)
    assert int(tokens.bits()[0]) == 6 * model.spec.length


def test_it_decodes_what_the_graph_of_training_decodes(model, pixels):
    tokens = model.encode(pixels)
    with model.inference():
        direct = model(pixels).clamp(0, 1)
    torch.testing.assert_close(model.decode(tokens), direct, rtol=1e-4, atol=1e-4)
    assert model.embed(tokens).shape == (4, 64, 16)
    assert model.decode(model.encode(pixels[..., :20, :30])).shape == (4, 3, 20, 30)


def test_training_lowers_the_loss(pixels):
    torch.manual_seed(0)
    model = vistok.create("var-tiny").train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    totals = []
    for step in range(15):
        batch = {"pixels": pixels}
        terms = model.loss(batch, step, torch.Generator())
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(terms["reconstruction"].item())
    assert set(terms) == {"reconstruction", "commitment", "codebook"}
    assert totals[-1] < 0.75 * totals[0]
    assert batch["reconstruction"].shape == pixels.shape
    assert model.quantizer.convs[0].weight.grad is not None


def test_judges(pixels):
    torch.manual_seed(0)
    model = vistok.create("var-tiny").train()
    critic = PatchDiscriminator(width=8, layers=1)
    model.judge(AdversarialLoss(critic, weight=0.5, adaptive=True), perceptual=lambda a, b: (a - b).abs().mean())
    batch = {"pixels": pixels}
    terms = model.loss(batch, 0, torch.Generator())
    assert {"adversarial", "perceptual"} <= set(terms)
    assert model.discriminator_loss(batch, 0).item() > 0


def test_authors_files_convert_and_go_back(model, tmp_path):
    theirs = key_table(model.config).to_theirs(model.state_dict())
    assert theirs["quantize.ema_vocab_hit_SV"].shape == (len(model.config.scales), 64)
    assert "decoder.mid.attn_1.qkv.weight" in theirs
    path, config = tmp_path / "vae.pth", tmp_path / "vae.yaml"
    torch.save(theirs, path)
    znorm = model.config.metric == "cosine"
    plain = {"z_channels": 16, "vocab_size": 64, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1}
    plain |= {"patch_nums": list(model.config.scales), "share_quant_resi": model.config.phis, "using_znorm": znorm}
    config.write_text(yaml.safe_dump(plain))
    done = checkpoints.convert_file(path, "var", tmp_path / "model", config=config)
    assert done["role"] == "tokenizer"
    assert done["variants"] == [model.name]
    back = vistok.load(tmp_path / "model")
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[key], value) for key, value in model.state_dict().items())
    checkpoints.export_file(tmp_path / "model", tmp_path / "back.pth")
    assert checkpoints.read(tmp_path / "back.pth").keys() == theirs.keys()


def test_shapes_tell_the_published_sizes_and_no_others(model):
    theirs = key_table(model.config).to_theirs(model.state_dict())
    seen = recognise(theirs)
    assert (seen.scales, seen.cnn, seen.phis) == (model.config.scales, model.config.cnn, model.config.phis)
    with pytest.raises(ConfigError, match="patch_nums"):
        recognise(theirs | {"quantize.ema_vocab_hit_SV": torch.zeros(7, 64)})
    with pytest.raises(MismatchError, match="patch_nums"):
        checkpoints.convert(theirs | {"quantize.ema_vocab_hit_SV": torch.zeros(7, 64)}, "var", role="tokenizer")
    assert recognise({key: value for key, value in theirs.items() if not key.startswith("quantize")}) is None


def test_configs_that_cannot_be_meant():
    with pytest.raises(ConfigError, match="double_z"):
        configure({"z_channels": 8, "patch_nums": [1, 2], "double_z": True})
    with pytest.raises(ConfigError, match="patch_nums"):
        configure({"z_channels": 8})
    with pytest.raises(ConfigError, match="odd"):
        VARTokenizerConfig(kernel=2)
    with pytest.raises(ConfigError, match="must grow"):
        vistok.create("var-tiny", scales=(1, 8, 4))


def test_files_of_the_authors_fill_a_model_that_replaces_codes():
    torch.manual_seed(0)
    model = vistok.create("var-tiny", restart=2.0)
    assert model.quantizer.counts.tolist() == [2.0] * 64
    table = key_table(model.config)
    theirs = table.to_theirs(model.state_dict())
    assert not any("counts" in key or "steps" in key for key in theirs)
    ours = table.to_ours(theirs)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


def test_it_runs_in_half_precision():
    torch.manual_seed(0)
    half = vistok.create("var-tiny", dtype=torch.bfloat16)
    tokens = half.encode(torch.rand(2, 3, 32, 32))
    assert half.decode(tokens).dtype == torch.bfloat16
