import pytest
import torch
from torch.autograd import gradcheck

from vistok.errors import ConfigError
from vistok.quantize import entropy as module
from vistok.quantize.entropy import EntropyTerm, bit_entropies, table_entropies


def plain(p: torch.Tensor, log: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both entropies from the whole table of probabilities (M, K)."""
    mean = p.mean(0)
    if log == "clamp":
        return -(p * p.clamp(min=1e-5).log()).sum(1).mean(), -(mean * mean.clamp(min=1e-5).log()).sum()
    return torch.special.entr(p).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()


@pytest.mark.parametrize("log", ["add", "clamp"])
@pytest.mark.parametrize("similarity", ["l2", "dot"])
@pytest.mark.parametrize("chunk", [1 << 21, 64])
def test_chunks_give_the_whole(monkeypatch: pytest.MonkeyPatch, log: str, similarity: str, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    z = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    term = EntropyTerm(temperature=0.3, log=log)  # type: ignore[arg-type]
    sample, batch = table_entropies(z, table, term, similarity)  # type: ignore[arg-type]
    ours = torch.autograd.grad(sample - 0.7 * batch, (z, table))
    logits = -torch.cdist(z, table).square() if similarity == "l2" else z @ table.T
    whole = plain((logits / 0.3).softmax(1), log)
    torch.testing.assert_close(sample, whole[0])
    torch.testing.assert_close(batch, whole[1])
    for got, wanted in zip(ours, torch.autograd.grad(whole[0] - 0.7 * whole[1], (z, table)), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("log", ["add", "clamp"])
@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1 << 21, 32])
def test_factorised_bits_give_the_table(monkeypatch: pytest.MonkeyPatch, log: str, bits: int, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    logits = torch.randn(40, bits, dtype=torch.float64, requires_grad=True)
    term = EntropyTerm(log=log)  # type: ignore[arg-type]
    codes = (torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1
    one = logits.sigmoid()[:, None]
    p = torch.where(codes.bool(), one, 1 - one).prod(2)
    whole, ours = plain(p, log), bit_entropies(logits, term)
    for got, wanted in zip(ours, whole, strict=True):
        torch.testing.assert_close(got, wanted)
        got, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (got, wanted))
        torch.testing.assert_close(got, wanted)


def test_entropy_over_bits_is_an_upper_bound_and_differentiable() -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(30, 4, dtype=torch.float64)).requires_grad_()
    logits.data[:, 1] = logits.data[:, 0]  # dependent bits
    term = EntropyTerm()
    joint, separate = bit_entropies(logits, term), bit_entropies(logits, term, "bits")
    torch.testing.assert_close(joint[0], separate[0])
    assert separate[1] > joint[1] + 0.05
    assert gradcheck(lambda x: bit_entropies(x, term, "bits")[1], logits)


def test_illegal_terms() -> None:
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        EntropyTerm(temperature=0)
    with pytest.raises(ConfigError, match="'add', 'clamp'"):
        EntropyTerm(log="plus")  # type: ignore[arg-type]
