import pytest
import torch

from tests.quantize.laws import DISCRETE, POSITIONS, build, latent
from vistok.errors import ConfigError, InputError
from vistok.quantize import FSQ, VectorQuantizer
from vistok.quantize.base import one_of

every = pytest.mark.parametrize("name", DISCRETE)


@every
def test_codes_decode_to_the_vectors_of_forward_exactly(name: str) -> None:
    quantizer = build(name).eval()
    z = latent(quantizer)
    out = quantizer(z)
    assert torch.equal(quantizer.encode(z), out.codes)
    decoded = quantizer.decode(out.codes)
    assert decoded.shape == out.vectors.shape == z.shape
    assert torch.equal(decoded, out.vectors)


@every
def test_codes_have_one_column_per_codebook_and_stay_inside_it(name: str) -> None:
    quantizer = build(name).eval()
    codes = quantizer(latent(quantizer)).codes
    assert codes.dtype == torch.long
    if "multiscale" in name:
        assert codes.shape == (3, 1 + 4 + 9)
    elif len(quantizer.codebooks) == 1:
        assert codes.shape == (3, POSITIONS)
    else:
        assert codes.shape == (3, POSITIONS, len(quantizer.codebooks))
    assert codes.min() >= 0
    assert (codes.reshape(-1, len(quantizer.codebooks)).amax(0) < torch.tensor(quantizer.codebooks)).all()


@every
def test_an_item_does_not_depend_on_its_batch(name: str) -> None:
    quantizer = build(name).eval()
    z = latent(quantizer)
    assert torch.equal(quantizer.encode(z)[1:2], quantizer.encode(z[1:2]))


@every
def test_gradients_reach_the_latent_and_are_finite(name: str) -> None:
    quantizer = build(name).train()
    z = latent(quantizer).requires_grad_()
    out = quantizer(z)
    (out.vectors.square().sum() + sum(out.losses.values())).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().sum() > 0
    for key, parameter in quantizer.named_parameters():
        if not key.startswith("project"):
            assert parameter.grad is not None, key


@every
def test_autocast_changes_nothing(name: str) -> None:
    z = latent(build(name))
    plain = build(name).eval()(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = build(name).eval()(z)
        decoded = build(name).eval().decode(plain.codes)
    assert mixed.vectors.dtype == decoded.dtype == torch.float32
    assert torch.equal(plain.codes, mixed.codes)
    assert torch.equal(plain.vectors, mixed.vectors)
    for term, value in plain.losses.items():
        assert torch.equal(value, mixed.losses[term]), term


@every
def test_half_precision_latents_are_compared_in_float32(name: str) -> None:
    quantizer = build(name).eval()
    z = latent(quantizer).bfloat16()
    out = quantizer(z)
    assert out.vectors.dtype == torch.bfloat16
    assert torch.equal(out.codes, quantizer.encode(z.float()))


@every
def test_weights_in_half_precision(name: str) -> None:
    quantizer = build(name).bfloat16().eval()
    z = latent(quantizer).bfloat16()
    out = quantizer(z)
    decoded = quantizer.decode(out.codes)
    stored = [tensor.dtype for tensor in quantizer.state_dict().values() if tensor.is_floating_point()]
    assert out.vectors.dtype == torch.bfloat16
    assert decoded.dtype == (stored[0] if stored else torch.float32)
    assert torch.equal(quantizer.encode(z), out.codes)
    assert (decoded.float() - out.vectors.float()).abs().max() <= 0.05


@every
def test_evaluation_and_encoding_leave_the_state_alone(name: str) -> None:
    quantizer = build(name).eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer(latent(quantizer))
    quantizer.train()
    quantizer.encode(latent(quantizer))
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key


@every
def test_an_empty_batch_passes(name: str) -> None:
    quantizer = build(name).train()
    out = quantizer(latent(quantizer)[:0])
    assert out.vectors.shape == (0, POSITIONS, quantizer.dim)
    assert all(torch.isfinite(value) for value in out.losses.values())
    assert all(torch.isfinite(value.float()).all() for value in quantizer.state_dict().values())


@every
def test_nan_and_infinity_are_errors(name: str) -> None:
    quantizer = build(name)
    for value in (torch.nan, -torch.inf):
        z = latent(quantizer)
        z[1, 2, 0] = value
        with pytest.raises(InputError, match="NaN or infinity"):
            quantizer(z)


@every
def test_wrong_input_says_what_is_expected(name: str) -> None:
    quantizer = build(name)
    with pytest.raises(InputError, match=rf"\(B, N, {quantizer.dim}\)"):
        quantizer(torch.zeros(2, quantizer.dim, 3, 3))
    with pytest.raises(InputError, match="floating-point"):
        quantizer(torch.zeros(2, POSITIONS, quantizer.dim, dtype=torch.long))
    codes = quantizer.eval().encode(latent(quantizer))
    with pytest.raises(InputError, match="legal are"):
        quantizer.decode(codes + max(quantizer.codebooks))
    with pytest.raises(InputError, match="integers"):
        quantizer.decode(codes.float())
    with pytest.raises(InputError, match="shape"):
        quantizer.decode(codes[0])


def test_usage_counts_what_forward_saw_until_reset() -> None:
    quantizer = FSQ((2, 2), symmetric=True)
    z = torch.tensor([[[-2.0, -2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]]])
    quantizer(z)
    assert quantizer.usage.used() == [0.75]
    assert quantizer.usage.frequencies()[0].tolist() == [0.5, 0.25, 0.25, 0.0]
    assert quantizer.usage.perplexity()[0] == pytest.approx(2**1.5)
    quantizer.usage.reset()
    with pytest.raises(InputError, match="no codes were counted"):
        quantizer.usage.used()


def test_usage_is_not_part_of_the_state_dict() -> None:
    assert list(VectorQuantizer(3, 4).state_dict()) == ["codebook"]


def test_illegal_options_name_the_legal_ones() -> None:
    with pytest.raises(ConfigError, match=r"'gradient', 'ema', 'cvq'.*'emma'.*did you mean 'ema'"):
        VectorQuantizer(3, 4, learning="emma")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="whole number"):
        VectorQuantizer(3, 0)
    with pytest.raises(ConfigError, match=r"decay must be in 0\.\.1"):
        VectorQuantizer(3, 4, decay=1.5)
    assert one_of("x", "a", ("a", "b")) == "a"
