import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vistok.errors import InputError
from vistok.quantize import GaussianQuantizer


def moments(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(0))


def test_the_default_is_the_mode() -> None:
    quantizer, z = GaussianQuantizer(4).eval(), moments()
    assert torch.equal(quantizer.encode(z), z[..., :4])
    assert torch.equal(quantizer(z).vectors, z[..., :4])
    assert quantizer.codebooks == ()
    assert quantizer(z).codes is None
    assert torch.equal(quantizer.decode(z[..., :4]), z[..., :4])


def test_an_items_sample_depends_on_its_seed_alone() -> None:
    quantizer, z = GaussianQuantizer(4), moments()
    seeded = quantizer.encode(z, seed=[5, 6, 5])
    assert torch.equal(seeded[1:2], quantizer.encode(z[1:2], seed=6))
    assert torch.equal(quantizer(z, seed=[5, 6, 5]).vectors, seeded)
    noise = (seeded - z[..., :4]) / torch.exp(z[..., 4:] / 2)
    torch.testing.assert_close(noise[0], noise[2])
    assert not torch.allclose(noise[0], noise[1])
    with pytest.raises(InputError, match="2 seeds for 3 items"):
        quantizer.encode(z, seed=[1, 2])


def test_samples_have_the_right_moments() -> None:
    z = torch.cat([torch.full((1, 50000, 1), 2.0), torch.full((1, 50000, 1), 0.5).log() * 2], -1)
    sample = GaussianQuantizer(1).encode(z, seed=0)
    assert sample.mean().item() == pytest.approx(2.0, abs=0.01)
    assert sample.std().item() == pytest.approx(0.5, abs=0.01)


def test_kl_is_the_divergence_to_the_standard_normal() -> None:
    z = moments()
    kl = kl_divergence(Normal(z[..., :4], torch.exp(z[..., 4:] / 2)), Normal(0.0, 1.0))
    out = GaussianQuantizer(4, weight=0.1)(z)
    torch.testing.assert_close(out.stats["kl"], kl.sum((1, 2)).mean())
    torch.testing.assert_close(out.losses["kl"], 0.1 * kl.sum((1, 2)).mean())
    torch.testing.assert_close(GaussianQuantizer(4, reduction="mean")(z).stats["kl"], kl.mean())


def test_training_samples_and_extreme_variances_stay_finite() -> None:
    quantizer, z = GaussianQuantizer(4).train(), moments()
    assert not torch.equal(quantizer(z).vectors, quantizer(z).vectors)
    z[..., 4:] = 1e4
    out = quantizer(z.requires_grad_())
    out.losses["kl"].backward()
    assert torch.isfinite(out.vectors).all()
    with pytest.raises(InputError, match=r"\(B, N, 8\)"):
        quantizer(torch.zeros(1, 5, 4))
