"""Cross-entropy of masked token models.

Sources: MaskGIT (arXiv:2202.04200) counts masked codes alone, TiTok (2406.07550) the others with weight 0.1, MaskBit
(2409.16211) all alike; each with label smoothing 0.1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_cross_entropy(
    logits: Tensor, codes: Tensor, masked: Tensor, unmasked: float = 0.0, smoothing: float = 0.1
) -> Tensor:
    """Weighted mean over all codes of a batch, scalar: `logits` (.., K), `codes` (..), `masked` bool (..).

    unmasked   weight of a code that is not masked; a masked one has 1
    smoothing  share of the target that all K codes have alike
    """
    each = F.cross_entropy(logits.float().flatten(0, -2), codes.flatten(), reduction="none", label_smoothing=smoothing)
    weight = torch.where(masked.flatten(), 1.0, unmasked)
    return (each * weight).sum() / (weight.sum() + 1e-8)
