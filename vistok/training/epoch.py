"""How much of each codebook an epoch used: RUN/codebooks.csv, one row for each pass over the pictures.

    step, epoch, used/quantizer, perplexity/quantizer, ...       `used` a share, `perplexity` exp(entropy) of all codes

A codebook that a few batches hardly touch may be in full use over an epoch; this is the number that papers give.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.processes import sum_over_processes
from vistok.quantize import Quantizer
from vistok.training.log import CsvLog, Curves


class EpochUsage:
    """Counts codes between the ends of epochs. Every method is for all processes alike; `main` alone writes.

    `items`: pictures of an epoch. `upto`: the step that the run goes on from, None for a fresh one.
    """

    def __init__(self, run: Path, items: int, curves: Curves, upto: int | None, main: bool) -> None:
        self._path, self._items, self._curves, self._upto, self._main = run / "codebooks.csv", items, curves, upto, main
        self._log: CsvLog | None = None
        self._books: dict[str, _Book] = {}

    def watch(self, model: nn.Module) -> None:
        """Turn to a model, whose quantizers count from here on."""
        self._books = {
            name: _Book(module)
            for name, module in model.named_modules()
            if isinstance(module, Quantizer) and module.usage.tracked
        }

    def after(self, step: int, batch_size: int) -> None:
        """After `step` steps: a row where an epoch has just ended."""
        epoch = step * batch_size // self._items
        if not self._books or epoch == (step - 1) * batch_size // self._items:
            return
        row: dict[str, Any] = {"step": step, "epoch": epoch}
        for name, book in self._books.items():
            row |= {f"{key}/{name}": value for key, value in book.take().items()}
        if self._main:
            if self._log is None:
                self._log = CsvLog(self._path, self._upto)
            self._log.add(row)
            self._curves.scalars("codebooks", row)

    def state_dict(self) -> dict[str, Tensor]:
        """Counts of the epoch so far, over all processes, for a checkpoint."""
        return {name: book.so_far() for name, book in self._books.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from these counts, which the main process keeps for all."""
        for name, book in self._books.items():
            if name in state and self._main:
                book.earlier = state[name].to(book.earlier.device)


class _Book:
    """Counts of one quantizer since the last epoch ended: those of its counter, which others may reset, and `earlier`
    ones.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.before = quantizer.usage.counts.clone()
        self.earlier = torch.zeros_like(self.before)

    def so_far(self) -> Tensor:
        now = self.quantizer.usage.counts
        fresh = now - self.before
        fresh = torch.where((fresh < 0).any(), now, fresh)  # a reset lies between
        return sum_over_processes(self.earlier + fresh)

    def take(self) -> dict[str, float]:
        counts = self.so_far()[:-1].double()
        self.before = self.quantizer.usage.counts.clone()
        self.earlier = torch.zeros_like(self.before)
        shares = [part / part.sum().clamp(min=1) for part in counts.split(list(self.quantizer.codebooks))]
        used = torch.stack([(share > 0).double().mean() for share in shares]).mean()
        entropy = torch.stack([torch.special.entr(share).sum() for share in shares]).mean()
        return dict(zip(("used", "perplexity"), torch.stack([used, entropy.exp()]).tolist(), strict=True))
