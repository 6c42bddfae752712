"""Which codes are in use: counts over everything seen since the last reset, not over a window."""

import torch
from torch import Tensor, nn

from vistok.errors import InputError
from vistok.quantize.processes import sum_over_processes

LIMIT = 1 << 22  # codes; larger codebooks are implicit ones whose counts would outgrow the model


class CodeUsage(nn.Module):
    """Counts how often each code occurs, per codebook. Counts are not part of the state dict.

    `codebooks` are the sizes of the codes at one position. Codes of -1 (absent) are not counted. Where the sizes add
    up to more than 4 million nothing is counted.
    """

    counts: Tensor

    def __init__(self, codebooks: tuple[int, ...]):
        super().__init__()
        self.codebooks = codebooks
        self.tracked = 0 < sum(codebooks) <= LIMIT
        total = sum(codebooks) if self.tracked else 0
        self.register_buffer("counts", torch.zeros(total + 1, dtype=torch.long), persistent=False)
        starts = [sum(codebooks[:index]) for index in range(len(codebooks))] if self.tracked else []
        self.starts = tuple(starts)

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Count `codes`: (B, N), or (B, N, C) with one column per codebook."""
        if not self.tracked:
            return
        if len(self.codebooks) > 1:
            slots = codes + torch.tensor(self.starts, device=codes.device)
        else:
            slots = codes
        trash = len(self.counts) - 1
        slots = torch.where(codes < 0, trash, slots).flatten()
        self.counts.scatter_add_(0, slots, torch.ones_like(slots))

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.counts.zero_()

    def frequencies(self) -> list[Tensor]:
        """Share of each code among all codes counted, one float64 tensor (K,) per codebook, over all processes.

        With several processes every one of them must call this. Raises InputError where nothing was counted.
        """
        if not self.tracked:
            raise InputError(f"codebooks of {sum(self.codebooks)} codes are too large to count (limit {LIMIT})")
        counts = sum_over_processes(self.counts.clone())[:-1].double()
        parts = counts.split(list(self.codebooks))
        if any(part.sum() == 0 for part in parts):
            raise InputError("no codes were counted yet: call the quantizer on some latents first")
        return [part / part.sum() for part in parts]

    def used(self) -> list[float]:
        """Share of each codebook that occurred at least once, in [0, 1]."""
        return [(share > 0).double().mean().item() for share in self.frequencies()]

    def perplexity(self) -> list[float]:
        """exp(entropy) of each codebook's frequencies: the number of codes that equal use would need, in [1, K]."""
        return [torch.special.entr(share).sum().exp().item() for share in self.frequencies()]
