import torch

from vistok.quantize import SimVQ


def test_one_step_moves_every_row_and_leaves_the_frozen_codebook() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(4, 32, codebook_dim=6)
    frozen, before = quantizer.frozen.clone(), quantizer.table().detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    sum(quantizer(torch.randn(1, 2, 4)).losses.values()).backward()
    optimizer.step()
    assert torch.equal(quantizer.frozen, frozen)
    assert ((quantizer.table() - before).abs().sum(1) > 0).all()


def test_encode_inverts_decode() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(4, 50)
    codes = torch.arange(50)[None]
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)
