"""VQ-VAE as a tokenizer: the contract, its loss, and that a recipe of its own lowers it."""

import pytest
import torch

import vistok
from vistok.errors import ConfigError
from vistok.tokenizers.vq_vae import VARIANTS, VQVAE, VQVAEConfig


def test_any_picture_goes_in_and_comes_back_in_its_size():
    torch.manual_seed(0)
    tok = vistok.create("vq-vae-tiny")
    images = torch.rand(2, 3, 30, 41)
    tokens = tok.encode(images)
    assert tokens.segments[0].shape == (8, 11)
    assert tok.decode(tokens).shape == images.shape
    assert tok.embed(tokens).shape == (2, 88, 8)
    assert torch.equal(tok.encode(images[1:]).codes, tokens.codes[1:])
    legal = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(tok.decode(tok.encode(legal)), tok(legal).clamp(0, 1), atol=1e-5)


def test_sizes_of_the_published_model():
    tok = vistok.create("vq-vae-32")
    assert tok.encode(torch.rand(1, 3, 32, 32)).codes.shape == (1, 64)
    assert tok.encode(torch.rand(1, 3, 128, 128)).codes.shape == (1, 1024)
    assert tok.quantizer.codebooks == (512,)
    assert [len(tok.encoder.levels), len(tok.decoder.grow)] == [2, 2]


def test_half_precision_runs():
    tok = vistok.create("vq-vae-small", dtype=torch.bfloat16)
    out = tok.decode(tok.encode(torch.rand(1, 3, 32, 32)))
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    tok = vistok.create("vq-vae-tiny").train()
    coarse = torch.rand(8, 3, 4, 4)
    pixels = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    optimizer = torch.optim.Adam(tok.parameters(), 3e-3)
    history = []
    for step in range(40):
        batch = {"pixels": pixels}
        terms = tok.loss(batch, step, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        history.append(float(terms["reconstruction"].detach()))
    assert set(terms) == {"reconstruction", "commitment"}
    assert batch["reconstruction"].shape == pixels.shape
    assert history[-1] < 0.5 * history[0]
    assert all(parameter.grad is not None for parameter in tok.parameters())


def test_judges_add_their_terms():
    tok = vistok.create("vq-vae-tiny").train()
    tok.judge(None, lambda image, target: (image - target).abs().mean((1, 2, 3)))
    terms = tok.loss({"pixels": torch.rand(2, 3, 32, 32)}, 0, torch.Generator())
    assert terms["perceptual"] > 0


def test_autocast_gives_a_loss_in_full_precision():
    torch.manual_seed(0)
    tok = vistok.create("vq-vae-tiny").train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = tok.loss({"pixels": torch.rand(2, 3, 32, 32)}, 0, torch.Generator())
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_scales_are_read_by_a_generator_over_scales():
    torch.manual_seed(0)
    tok = vistok.create("vq-vae-small-scales", widths=(16, 16), blocks=(0, 1), codebook_size=32)
    tokens = tok.encode(torch.rand(2, 3, 32, 32))
    assert [segment.shape for segment in tokens.segments] == [(1, 1), (2, 2), (4, 4), (8, 8)]
    assert tok.decode(tokens.prefix(21)).shape == (2, 3, 32, 32)
    terms = tok.train().loss({"pixels": torch.rand(2, 3, 32, 32)}, 0, torch.Generator())
    assert set(terms) == {"reconstruction", "commitment", "codebook"}
    gen = vistok.create("var-generator-tiny", scales=(1, 2, 4, 8), codebook_size=32, code_dim=8)
    made = gen.attach(tok.eval()).generate(3, count=2)
    assert tok.decode(made).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "changes",
    [{"blocks": (1,)}, {"widths": ()}, {"residual": 0.0}, {"blocks": (0, -1)}, {"scales": (1, 4)}],
)
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ConfigError, match=r"expected|got|scales"):
        VQVAEConfig(**changes)


def test_variants_build():
    for name, config in VARIANTS.items():
        sides = config.scales or (config.resolution // config.factor,)
        with torch.device("meta"):
            assert VQVAE(config, name).spec.length == sum(side * side for side in sides)


def test_codes_of_scales_can_be_replaced_too():
    assert VQVAE(VARIANTS["vq-vae-small-scales"]).quantizer.restart_below == 0
    torch.manual_seed(0)
    model = vistok.create("vq-vae-small-scales", restart=1.0).train()
    model.loss({"pixels": torch.rand(4, 3, 32, 32)}, 0, torch.Generator())
    assert int(model.quantizer.steps) == 1
