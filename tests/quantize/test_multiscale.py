import pytest
import torch

from vistok.errors import ConfigError, InputError
from vistok.quantize import MultiScaleVectorQuantizer
from vistok.quantize.multiscale import authors_state, nearest_convs


def quantizer(scales: object = (1, 2, 4), **options: object) -> MultiScaleVectorQuantizer:
    torch.manual_seed(0)
    made = MultiScaleVectorQuantizer(3, 32, scales, **options)  # type: ignore[arg-type]
    made.codebook.data.normal_()
    return made


def test_published_convolutions_of_each_scale() -> None:
    assert nearest_convs(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert nearest_convs(5, 4) == (0, 1, 2, 2, 3)
    assert nearest_convs(4, 4) == (0, 1, 2, 3)
    assert nearest_convs(3, 1) == (0, 0, 0)
    assert nearest_convs(1, 4) == (0,)
    assert quantizer(convs=0).conv_of_scale == (0, 1, 2)


def test_prefixes_of_whole_scales_decode_and_others_are_refused() -> None:
    q = quantizer().eval()
    codes = q.encode(torch.randn(2, 16, 3))
    sums = q.cumulative(codes)
    for length, total in zip((1, 5, 21), sums, strict=True):
        assert torch.equal(q.decode(codes[:, :length]), total)
    with pytest.raises(InputError, match="1, 5, 21"):
        q.decode(codes[:, :6])


def test_generation_step_by_step_agrees_with_teacher_forcing() -> None:
    q = quantizer(((1, 1), (2, 1), (4, 2), (4, 4))).eval()
    codes = q.encode(torch.randn(2, 16, 3))
    f_hat, inputs = None, []
    for scale, part in enumerate(q.split(codes)):
        f_hat, following = q.advance(scale, part, f_hat)
        if following is not None:
            inputs.append(following)
    assert following is None
    assert torch.equal(f_hat, q.decode(codes))
    assert torch.equal(torch.cat(inputs, 1), q.next_inputs(codes))
    assert torch.equal(torch.cat(inputs[:2], 1), q.next_inputs(codes[:, :3]))
    assert q.next_inputs(codes).shape == (2, 2 + 8 + 16, 3)


def test_scale_dropout_leaves_out_the_last_scales_of_an_item() -> None:
    q = quantizer(scale_dropout=1.0).train()
    out = q(torch.randn(40, 16, 3))
    kept = torch.stack([(part >= 0).all(1) for part in q.split(out.codes)], 1)
    assert kept[:, 0].all()
    assert {tuple(row) for row in kept.int().tolist()} == {(1, 0, 0), (1, 1, 0), (1, 1, 1)}
    assert torch.equal(q.decode(out.codes), out.vectors)
    assert (q.eval()(torch.randn(4, 16, 3)).codes >= 0).all()


def test_commitment_is_a_mean_or_a_sum() -> None:
    z = torch.randn(2, 16, 3)
    mean, total = quantizer()(z).losses, quantizer(commitment_over="sum")(z).losses
    torch.testing.assert_close(mean["commitment"] * 3, total["commitment"])
    torch.testing.assert_close(mean["codebook"], total["codebook"])


def test_without_a_convolution_the_vectors_are_the_resized_rows() -> None:
    q = quantizer((1, 2), ratio=0.0)
    assert list(q.state_dict()) == ["codebook"]
    codes = torch.tensor([[3, 0, 1, 2, 4]])
    torch.testing.assert_close(q.decode(codes), q.codebook[codes[:, 1:]] + q.codebook[3])


def test_latents_of_another_grid_and_shrinking_scales_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(4, 4\) = 16 positions, got 9"):
        quantizer()(torch.zeros(1, 9, 3))
    with pytest.raises(ConfigError, match="must grow"):
        quantizer((2, 1))


def test_authors_names() -> None:
    names = ("embedding.weight", "quant_resi.qresi_ls.2.bias", "ema_vocab_hit_SV")
    assert set(authors_state(dict.fromkeys(names, torch.zeros(1)))) == {"codebook", "convs.2.bias"}
    assert set(authors_state({"quant_resi.qresi.weight": torch.zeros(1)})) == {"convs.0.weight"}
    assert set(authors_state({"quant_resi.7.weight": torch.zeros(1)})) == {"convs.7.weight"}


def test_codes_that_nothing_chooses_are_replaced() -> None:
    def used(**options: float) -> float:
        q = quantizer(**options).train()
        q.codebook.data.mul_(20)[0] = 0  # all but one far from every latent
        for _ in range(3):
            q.usage.reset()
            q(torch.randn(16, 16, 3, generator=torch.Generator().manual_seed(0)))
        return q.usage.used()[0]

    assert used() < 0.2
    assert used(restart_below=1.0) > 0.8
    q = quantizer(restart_below=1.0).train()
    before = q.codebook.detach().clone()
    out = q(torch.randn(16, 16, 3))
    chosen = torch.bincount(out.codes.flatten(), minlength=32) > 0
    assert torch.equal(q.codebook[chosen], before[chosen])
    assert not torch.equal(q.codebook[~chosen], before[~chosen])
    sum(out.losses.values()).backward()  # the graph outlives the replacement
    assert int(q.steps) == 1
    q.eval()(torch.randn(16, 16, 3))
    assert int(q.steps) == 1
    assert not hasattr(quantizer(), "counts")
