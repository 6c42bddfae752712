import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from vistok.quantize import EntropyTerm, VectorQuantizer
from vistok.quantize.vq import authors_state

LEARNING = ("gradient", "ema", "cvq")


def spread(quantizer: VectorQuantizer, seed: int = 0) -> VectorQuantizer:
    rows = torch.randn(quantizer.codebook.shape, generator=torch.Generator().manual_seed(seed))
    quantizer.codebook.data.copy_(normalize(rows, dim=1) if quantizer.metric == "cosine" else rows)
    return quantizer


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("learning", LEARNING)
def test_encode_inverts_decode(metric: str, learning: str) -> None:
    quantizer = spread(VectorQuantizer(5, 300, metric=metric, learning=learning))  # type: ignore[arg-type]
    codes = torch.arange(300).view(3, 100)
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


def test_straight_through_gradient_is_the_identity() -> None:
    quantizer = spread(VectorQuantizer(3, 8))
    z = torch.randn(2, 5, 3, requires_grad=True)
    weight = torch.randn(2, 5, 3)
    (quantizer(z).vectors * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert quantizer.codebook.grad is None


def test_losses_pull_latent_and_codebook_together() -> None:
    quantizer = spread(VectorQuantizer(2, 4, commitment=0.5, codebook_weight=2.0))
    z = torch.randn(1, 6, 2, requires_grad=True)
    out = quantizer(z)
    distance = (z - quantizer.decode(out.codes)).square().mean()
    torch.testing.assert_close(out.losses["commitment"], 0.5 * distance)
    torch.testing.assert_close(out.losses["codebook"], 2.0 * distance)
    out.losses["codebook"].backward()
    assert z.grad is None or not z.grad.any()
    assert quantizer.codebook.grad.any()


def test_entropy_gradient_is_right() -> None:
    torch.manual_seed(0)
    quantizer = spread(
        VectorQuantizer(3, 5, metric="cosine", entropy=EntropyTerm(weight=1.0, temperature=0.5))
    ).double()
    z = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: quantizer(x).losses["entropy"], z)


def test_ema_rows_move_to_the_mean_of_their_latents() -> None:
    quantizer = VectorQuantizer(2, 2, learning="ema", decay=0.5)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    quantizer.sums.copy_(quantizer.codebook)
    z = torch.tensor([[[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]]])
    for _ in range(60):
        quantizer(z)
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[2.0, 1.0], [9.0, 9.0]]), atol=1e-3, rtol=0)
    assert not quantizer(z).losses.get("codebook")


@pytest.mark.parametrize("learning", ["gradient", "ema"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_restart_revives_dead_codes(learning: str, metric: str) -> None:
    torch.manual_seed(0)

    def used(restart: float) -> float:
        torch.manual_seed(1)
        quantizer = VectorQuantizer(
            4,
            32,
            learning=learning,
            metric=metric,
            decay=0.9,
            restart_below=restart,  # type: ignore[arg-type]
        )
        rows = torch.randn(32, 4) * 0.01 + torch.tensor([-9.0, 0, 0, 0])  # all codes on one far side
        quantizer.codebook.data.copy_(normalize(rows, dim=1) if metric == "cosine" else rows)
        if learning == "ema":
            quantizer.sums.copy_(quantizer.codebook)
        data = torch.randn(20, 16, 16, 4)
        for batch in data:
            quantizer(batch)
        quantizer.usage.reset()
        quantizer.eval()(data[-1])
        return quantizer.usage.used()[0]

    assert used(0.5) > 0.7
    assert used(0.5) > used(0.0) + 0.2


def test_restart_is_reproducible_and_counts_its_steps() -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(3)
        quantizer = VectorQuantizer(3, 16, learning="ema", restart_below=2.0, seed=5)
        z = torch.randn(4, 2, 8, 3)
        torch.seed()  # the global generator must not matter
        for batch in z:
            quantizer(batch)
        assert int(quantizer.steps) == 4
        return quantizer.codebook

    assert torch.equal(run(), run())


def test_restart_does_not_disturb_the_backward_pass() -> None:
    def gradient(restart: float) -> torch.Tensor:
        entropy = EntropyTerm(weight=0.1, temperature=0.5)
        quantizer = spread(VectorQuantizer(3, 16, metric="cosine", entropy=entropy, restart_below=restart))
        z = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
        out = quantizer(z)
        sum(out.losses.values()).backward()
        return quantizer.codebook.grad

    torch.testing.assert_close(gradient(5.0), gradient(0.0))


def test_cvq_moves_unused_rows_to_their_nearest_latent() -> None:
    quantizer = VectorQuantizer(2, 3, learning="cvq")
    quantizer.codebook.data.copy_(torch.tensor([[1.0, 1.0], [50.0, 0.0], [0.0, 50.0]]))
    z = torch.tensor([[[1.0, 1.1], [2.0, 0.0], [0.0, 3.0]]])
    out = quantizer(z)
    assert out.codes.tolist() == [[0, 0, 0]]
    usage = torch.tensor([0.01, 0.0, 0.0])
    torch.testing.assert_close(quantizer.counts, usage)
    move = torch.exp(-usage * 3 * 10 / 0.01 - 1e-3)[:, None]
    old = torch.tensor([[1.0, 1.0], [50.0, 0.0], [0.0, 50.0]])
    anchors = torch.tensor([[1.0, 1.1], [2.0, 0.0], [0.0, 3.0]])
    torch.testing.assert_close(quantizer.codebook.data, old * (1 - move) + anchors * move)
    sum(out.losses.values()).backward()  # the rows were overwritten after the forward pass


def test_cvq_with_unit_vectors_compares_directions_and_moves_to_the_latents_themselves() -> None:
    quantizer = VectorQuantizer(2, 2, learning="cvq", metric="cosine")
    quantizer.codebook.data.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    out = quantizer(torch.tensor([[[5.0, 0.5], [0.5, 3.0]]]))
    assert out.codes.tolist() == [[0, 0]]
    move = torch.exp(torch.tensor([-0.01 * 2 * 10 / 0.01 - 1e-3, -1e-3]))[:, None]
    old = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    anchors = torch.tensor([[5.0, 0.5], [5.0, 0.5]])  # the direction (5, 0.5) is the nearer one for both
    torch.testing.assert_close(quantizer.codebook.data, old * (1 - move) + anchors * move)


def test_bfloat16_latents_do_not_flip_codes_of_the_codebook() -> None:
    quantizer = spread(VectorQuantizer(8, 64))
    codes = torch.arange(64)[None]
    assert torch.equal(quantizer.encode(quantizer.decode(codes).bfloat16()), codes)


def test_authors_names() -> None:
    rows = torch.randn(4, 3)
    assert authors_state({"embedding.weight": rows, "codebook_used": torch.zeros(9)}) == {"codebook": rows}
    state = authors_state({"_codebook.embed": rows[None], "_codebook.initted": torch.ones(1)})
    assert torch.equal(state["codebook"], rows)
