import pytest
import torch

from vistok.errors import ConfigError, InputError
from vistok.quantize import FSQ, LFQ, ResidualFSQ, ResidualQuantizer, ResidualVQ


def rvq(**options: object) -> ResidualVQ:
    torch.manual_seed(0)
    quantizer = ResidualVQ(4, 16, 3, learning="ema", **options)  # type: ignore[arg-type]
    for index, level in enumerate(quantizer.quantizers):
        level.codebook.copy_(torch.randn(16, 4) * 0.5**index)
        level.sums.copy_(level.codebook)
    return quantizer


@pytest.mark.parametrize("make", [rvq, lambda: ResidualFSQ((7, 5, 4, 3), 3)])
def test_each_level_lowers_the_error(make: object) -> None:
    quantizer = make().eval()  # type: ignore[operator]
    z = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0)) * 0.7
    target = quantizer._before(z)
    errors = [(quantizer.decode(quantizer.encode(z, levels=count)) - target).square().mean() for count in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_codes_beyond_a_prefix_are_minus_one_and_decode_to_nothing() -> None:
    quantizer = rvq().eval()
    z = torch.randn(2, 5, 4)
    full, short = quantizer.encode(z), quantizer.encode(z, levels=2)
    assert torch.equal(short[..., :2], full[..., :2])
    assert (short[..., 2] == -1).all()
    levels = quantizer.decode_levels(full)
    assert torch.equal(quantizer.decode(short), levels[0] + levels[1])
    with pytest.raises(InputError, match=r"1\.\.3"):
        quantizer.encode(z, levels=4)


def test_keep_cuts_each_item_by_itself() -> None:
    quantizer = rvq().train()
    z = torch.randn(3, 5, 4)
    before = [level.counts.clone() for level in quantizer.quantizers]
    out = quantizer(z, keep=torch.tensor([1, 3, 2]))
    assert (out.codes[0, :, 1:] == -1).all()
    assert (out.codes[1] >= 0).all()
    assert (out.codes[2, :, 2] == -1).all()
    fresh = rvq().eval()
    torch.testing.assert_close(out.vectors, fresh.decode(out.codes), atol=0, rtol=0)
    # the third level's statistics saw the five positions of one item
    seen = (quantizer.quantizers[2].counts - before[2] * 0.99).sum() / 0.01
    assert seen.item() == pytest.approx(5, abs=1e-2)
    with pytest.raises(InputError, match="legal are 1"):
        quantizer(z, keep=torch.tensor([0, 1, 1]))


def test_dropout_is_drawn_from_the_generator_in_training_only() -> None:
    quantizer = rvq(dropout=1.0, min_levels=2).train()
    z = torch.randn(64, 1, 4)
    first = quantizer(z, generator=torch.Generator().manual_seed(7)).codes
    again = rvq(dropout=1.0, min_levels=2).train()(z, generator=torch.Generator().manual_seed(7)).codes
    assert torch.equal(first, again)
    kept = (first >= 0).sum(-1).flatten()
    assert set(kept.tolist()) == {2, 3}
    assert (quantizer.eval()(z).codes >= 0).all()


def test_a_level_that_no_item_keeps_has_finite_losses() -> None:
    out = rvq().train()(torch.randn(2, 3, 4, requires_grad=True), keep=torch.tensor([1, 1]))
    assert out.stats["commitment"][1:].tolist() == [0, 0]
    out.losses["commitment"].backward()


def test_shared_codebook_learns_once_per_step() -> None:
    quantizer = rvq(shared=True).train()
    book = quantizer.quantizers[0]
    assert all(level is book for level in quantizer.quantizers)
    start = book.codebook.clone()
    z = torch.randn(2, 10, 4)
    out = quantizer(z)
    torch.testing.assert_close(out.vectors.sum(), start[out.codes].sum(2).sum(), atol=1e-4, rtol=0)
    assert book.counts.sum().item() == pytest.approx(16 * 0.99 + 2 * 10 * 3 * 0.01, abs=1e-4)
    assert len(quantizer.state_dict()) == 9  # three names of one codebook, as separate levels have


def test_residual_fsq_refines_the_grid_by_its_levels() -> None:
    quantizer = ResidualFSQ((5,), 2)
    values = quantizer.decode(torch.cartesian_prod(torch.arange(5), torch.arange(5))[None]).flatten()
    assert values.unique().numel() == 25
    torch.testing.assert_close(values.max(), torch.tensor(1.2))
    wide = torch.linspace(-0.9, 0.9, 181)[None, :, None]
    z = torch.atanh(wide / 1.25) * 1.25  # undo the soft bound
    assert (quantizer(z).vectors - wide).abs().max() <= 0.5 / 2 / 5 + 1e-5


def test_levels_must_fit() -> None:
    with pytest.raises(ConfigError, match="one code each"):
        ResidualQuantizer([LFQ((2, 2)), LFQ((2, 2))])
    with pytest.raises(ConfigError, match="same dim"):
        ResidualQuantizer([FSQ((3, 3)), FSQ((3,))])
    with pytest.raises(ConfigError, match="min_levels"):
        ResidualVQ(3, 4, 2, min_levels=3)
