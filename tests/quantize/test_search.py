import pytest
import torch

from vistok.errors import InputError
from vistok.quantize.search import nearest, nearest_with_score


def brute(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return (z.double()[:, None] - codebook.double()[None]).square().sum(2).argmin(1)


@pytest.mark.parametrize(
    ("count", "size", "dim"), [(1, 1, 1), (7, 63, 3), (300, 65, 8), (1000, 9000, 4), (70, 4096, 33)]
)
def test_agrees_with_brute_force(count: int, size: int, dim: int) -> None:
    torch.manual_seed(count)
    z, codebook = torch.randn(count, dim), torch.randn(size, dim)
    assert torch.equal(nearest(z, codebook), brute(z, codebook))
    assert torch.equal(nearest(z, codebook, "dot"), (z.double() @ codebook.double().T).argmax(1))


def test_the_first_of_equal_rows_wins() -> None:
    codebook = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([codebook, codebook])
    assert torch.equal(nearest(codebook, twice), torch.arange(5000))
    assert nearest(torch.zeros(2, 6), torch.zeros(200, 6)).tolist() == [0, 0]


def test_a_codebook_far_from_the_origin_keeps_its_neighbours() -> None:
    torch.manual_seed(0)
    codebook = torch.randn(500, 8) + 300.0  # |e|^2 alone is near 10^6 here, float32 steps of it are 0.06
    z = codebook[torch.randint(500, (400,))] + 0.01 * torch.randn(400, 8)
    assert torch.equal(nearest(z, codebook), brute(z, codebook))


def test_score_is_minus_half_the_squared_distance() -> None:
    torch.manual_seed(0)
    z, codebook = torch.randn(20, 3), torch.randn(100, 3)
    codes, score = nearest_with_score(z, codebook)
    torch.testing.assert_close(score, -(z - codebook[codes]).square().sum(1) / 2)


def test_nan_is_refused_and_nothing_is_fine() -> None:
    with pytest.raises(InputError, match="NaN"):
        nearest(torch.tensor([[0.0, torch.nan]]), torch.zeros(3, 2))
    assert nearest(torch.zeros(0, 2), torch.zeros(3, 2)).shape == (0,)
