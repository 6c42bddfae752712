"""The masked cross-entropy against its formula, and the three weights that papers use."""

import torch
from torch.nn import functional as F

from vistok.losses.masked import masked_cross_entropy


def case():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 2, 7, generator=rng, requires_grad=True)
    codes = torch.randint(7, (3, 5, 2), generator=rng)
    return logits, codes, torch.rand(3, 5, 2, generator=rng) < 0.4


def test_masked_codes_alone():
    logits, codes, masked = case()
    loss = masked_cross_entropy(logits, codes, masked)
    torch.testing.assert_close(loss, F.cross_entropy(logits[masked], codes[masked], label_smoothing=0.1))
    loss.backward()
    assert float(logits.grad[~masked].abs().max()) == 0


def test_all_codes_alike():
    logits, codes, masked = case()
    loss = masked_cross_entropy(logits, codes, masked, unmasked=1.0, smoothing=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 2), codes.flatten()))


def test_a_weight_between():
    logits, codes, masked = case()
    log_p = logits.log_softmax(-1)
    each = -(0.9 * log_p.gather(-1, codes[..., None])[..., 0] + 0.1 * log_p.mean(-1))
    weight = masked + 0.1 * ~masked
    torch.testing.assert_close(
        masked_cross_entropy(logits, codes, masked, unmasked=0.1), (each * weight).sum() / weight.sum()
    )


def test_nothing_masked_is_no_loss():
    logits, codes, masked = case()
    assert float(masked_cross_entropy(logits, codes, torch.zeros_like(masked)).detach()) == 0
