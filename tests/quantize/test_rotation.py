import torch

from vistok.quantize.rotation import floor_through, rotate, round_through, straight_through


def test_rotation_gives_the_code_and_turns_the_gradient() -> None:
    torch.manual_seed(0)
    z, q = torch.randn(50, 6, dtype=torch.float64, requires_grad=True), torch.randn(50, 6, dtype=torch.float64)
    out = rotate(z, q)
    torch.testing.assert_close(out, q, atol=1e-12, rtol=1e-12)
    # a gradient along q reaches z along z: the angle between gradient and vector is kept, lengths scale by |q| / |z|
    (out * q).sum().backward()
    ratio = (q.norm(dim=1) / z.detach().norm(dim=1))[:, None]
    torch.testing.assert_close(
        z.grad, ratio * q.norm(dim=1, keepdim=True) * z.detach() / z.detach().norm(dim=1)[:, None]
    )


def test_rotation_preserves_angles_of_any_gradient() -> None:
    torch.manual_seed(1)
    z, q, g = torch.randn(3, 20, 5, dtype=torch.float64).unbind()
    z.requires_grad_()
    (rotate(z, q) * g).sum().backward()
    cos = torch.cosine_similarity
    torch.testing.assert_close(cos(z.grad, z.detach(), 1), cos(g, q, 1))


def test_degenerate_vectors_stay_finite() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]], requires_grad=True)
    out = rotate(z, torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, -2.0]]))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(z.grad).all()


def test_straight_through_is_exact() -> None:
    z, q = torch.randn(9, requires_grad=True), torch.randn(9, requires_grad=True) * 1e-6
    assert torch.equal(straight_through(z, q), q)
    for function, expected in ((round_through, torch.round), (floor_through, torch.floor)):
        x = torch.tensor([0.5, 1.5, -0.2], requires_grad=True)
        assert torch.equal(function(x), expected(x))
        function(x).sum().backward()
        assert x.grad.tolist() == [1, 1, 1]
