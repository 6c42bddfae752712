"""What a run says of itself while it trains: rows, curves, pictures and lines on the console.

    Outcome of every step -> sums -> every so often a row of log.csv: means of the terms, rates, images/s, waiting
    validation, samples, codebooks and vitals -> files of their own, and all of it -> TensorBoard

Sums since the last row are part of a checkpoint, so that the rows of a resumed run are those of one that was never
stopped.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.data.images import write_image
from vistok.training.doctor import Doctor
from vistok.training.epoch import EpochUsage
from vistok.training.log import CsvLog, Curves, Display
from vistok.training.recipe import Recipe
from vistok.training.reference import Comparison
from vistok.training.run import RunFolder
from vistok.training.step import Outcome


class Report:
    """The report of one run. Methods are for all processes alike; `main` alone writes.

    facts: of the data, as RUN/run.json has them. items: pictures that are trained on. begun: the step that the run
    goes on from, None for a fresh one. shared: the mean over processes of a tensor of sums.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        facts: dict[str, Any],
        items: int,
        begun: int | None,
        main: bool,
        console: Any,
        shared: Callable[[Tensor], Tensor],
    ) -> None:
        self.path, self.main, self._shared = folder.path, main, shared
        held = [one for _, one in recipe.resolved()]
        self.log = CsvLog(self.path / "log.csv", begun) if main else None
        self.validation_log = CsvLog(self.path / "validation.csv", begun) if main else None
        self.reference = Comparison.of_run(recipe, facts, self.log.path) if self.log is not None else None
        self.curves = Curves(self.path / "tensorboard", recipe.train.tensorboard and main, begun or 0)
        self.display = Display(console, sum(one.train.steps for one in held), begun or 0)
        self.doctor = Doctor(self.path, recipe, self.curves, self.display, begun, main)
        self.epochs = EpochUsage(self.path, items, self.curves, begun, main)
        self.terms: list[str] = []
        self.window: Tensor | None = None  # sums of the weighted terms and of the gradient's norm since the last row
        self.window_steps = 0
        self.facts: dict[str, tuple[Tensor, int]] = {}  # sums and counts of the steps' further facts
        self.waited = 0.0

    def note(self, line: str) -> None:
        """A line for the user."""
        self.display.note(line)

    def start_clock(self, step: int) -> None:
        """Speeds are measured from here on."""
        self.clock, self.clock_step, self.waited = time.perf_counter(), step, 0.0

    def add(self, outcome: Outcome) -> None:
        """Take in what a step came to."""
        if outcome.terms != self.terms:  # the means of another set of terms begin here
            self.window, self.window_steps, self.terms = None, 0, outcome.terms
        self.window = outcome.values if self.window is None else self.window + outcome.values
        self.window_steps += 1
        for name, value in outcome.facts.items():
            total, count = self.facts.get(name, (0.0, 0))
            self.facts[name] = (total + value.detach().float(), count + 1)

    def row(self, step: int, rate: float, batch_size: int) -> None:
        """Write the means since the last row, and begin new ones."""
        assert self.window is not None
        means = self._shared(self.window / self.window_steps)
        counts = torch.tensor([float(count) for _, count in self.facts.values()])
        sums = torch.stack([total for total, _ in self.facts.values()]) if len(counts) else counts
        facts = self._shared(sums / counts.to(sums)) if len(counts) else counts
        elapsed = time.perf_counter() - self.clock
        row: dict[str, Any] = {}
        if self.log is not None:
            *values, norm = means.tolist()
            row |= {"step": step, "loss": math.fsum(values)}
            row |= dict(zip(self.terms, values, strict=True))
            row |= {"lr": rate, "grad_norm": norm}
            row |= dict(zip(self.facts, facts.tolist(), strict=True))
            done = step - self.clock_step
            row |= {"images_per_second": done * batch_size / elapsed, "waiting": self.waited / elapsed}
            self.log.add(row)
            self.curves.scalars("train", row)
            self.display.row(row, self.terms)
            told = self.reference.add(step, row["loss"]) if self.reference is not None else None
            if told is not None:
                self.note(told)
        self.doctor.row(row, self.terms)
        self.window, self.window_steps, self.facts = None, 0, {}
        self.start_clock(step)

    def validation(self, step: int, found: dict[str, float], pictures: int, unit: str) -> None:
        """Write what validation found on so many held-out pictures. For the main process."""
        assert self.validation_log is not None
        row = {"step": step, **found}
        self.validation_log.add(row)
        self.doctor.validated(row)
        self.curves.scalars("validation", row)
        told = "  ".join(f"{name} {value:.2f}{unit}" for name, value in found.items())
        self.note(f"step {step}: {told} on {pictures} held-out pictures")

    def samples(self, step: int, grid: Tensor) -> None:
        """Write a grid of pictures, uint8 (3, H, W). For the main process."""
        write_image(self.path / "samples" / f"step-{step:08d}.png", grid)
        self.curves.image("samples", grid, step)

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last row and counts of the epoch, over all processes, for a checkpoint."""
        window = self._shared(self.window) if self.window is not None and self.window_steps else None
        facts = {name: (self._shared(total), count) for name, (total, count) in self.facts.items()}
        return {
            "terms": self.terms,
            "window": None if window is None else window.cpu(),
            "window_steps": self.window_steps,
            "facts": {name: (total.cpu(), count) for name, (total, count) in facts.items()},
            "codebooks": {name: counts.cpu() for name, counts in self.epochs.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state_dict`, onto the model's device; after `epochs.watch`."""
        self.terms, self.window_steps = list(state["terms"]), state["window_steps"]
        self.window = None if state["window"] is None else state["window"].to(device)
        facts = state.get("facts", {})
        self.facts = {name: (total.to(device), count) for name, (total, count) in facts.items()}
        self.epochs.load_state_dict(state.get("codebooks", {}))

    def verdict(self) -> None:
        """How the run compares with the recipe's reference curve, where there is one."""
        told = self.reference.verdict() if self.reference is not None else None
        if told is not None:
            self.note(told)

    def close(self) -> None:
        """Let go of files, hooks and the progress bar."""
        self.doctor.end()
        self.display.close()
        self.curves.close()
