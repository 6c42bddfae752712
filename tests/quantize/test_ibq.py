import pytest
import torch
from torch.nn.functional import one_hot

from vistok.quantize import IBQ
from vistok.quantize import ibq as module


@pytest.mark.parametrize("chunk", [1 << 21, 16])
def test_gradient_is_that_of_the_soft_assignment(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    torch.manual_seed(0)
    quantizer = IBQ(3, 7, entropy=None).double()
    quantizer.codebook.data.normal_()
    z, weight = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(2, 20, 3, dtype=torch.float64)
    table = quantizer.codebook.detach().clone().requires_grad_()
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()

    out = quantizer(x)
    (out.vectors * weight).sum().backward()
    soft = (y @ table.T).softmax(-1)
    hard = one_hot(soft.argmax(-1), 7).double()
    ((hard - soft.detach() + soft) @ table * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(quantizer.codebook.grad, table.grad)
    assert torch.equal(out.codes, hard.argmax(-1))
    assert (quantizer.codebook.grad.abs().sum(1) > 0).all()
