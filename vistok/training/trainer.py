"""The loop: batches in, weights out, and nothing between that a resumed run would do differently.

    batch(step) -> model.loss(batch, step, rng) -> {term: value} -> sum of weight * value -> backward, clip, step
                -> model.after_step(step) -> EMA      every so often: log row, validation, samples, checkpoint

Batches, random numbers and the learning rate are pure functions of (seed, step), so weights, moments and the step are
all that a run has to remember: killed at any moment and resumed, it ends in the same bits (on the CPU; on a GPU as far
as its kernels are deterministic). A model knows nothing of this file. It has

    loss(batch, step, rng) -> {term: scalar}      batch as PixelLoader gives it, on the model's device
    initialise(batches, rng)                      optional, once before step 0: codebooks from data, and the like
    after_step(step)                              optional, after every optimizer step

rng is a torch.Generator on the model's device, seeded for the step; torch's global one is too.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import vistok
from vistok.data.images import write_image
from vistok.data.loader import PixelLoader
from vistok.data.sources import open_source
from vistok.errors import ConfigError, VistokError, nearest
from vistok.generator import Generator
from vistok.tokenizer import Tokenizer
from vistok.training import checkpoint as checkpoints
from vistok.training.checkpoint import Checkpoint, step_seed
from vistok.training.doctor import Doctor
from vistok.training.ema import Ema
from vistok.training.log import CsvLog, Curves, Display
from vistok.training.optimizer import build_optimizer, learning_rate
from vistok.training.prepare import Objective, StopSignals, accelerator, build_model, freeze, parts, place
from vistok.training.recipe import Recipe
from vistok.training.reference import Comparison
from vistok.training.run import RunFolder
from vistok.training.validation import SHOWN, generated_grid, generator_loss, measure, read_crops, sample_grid, split


class DivergedError(VistokError, ArithmeticError):
    """The loss or the gradient is no longer finite."""


class StoppedError(VistokError, RuntimeError):
    """The run was asked to stop, has written a checkpoint, and can be resumed."""


def train(
    recipe: Recipe,
    data: Any,
    run: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Any = None,
) -> Path:
    """Train by a recipe on `data` (what `open_source` takes) in the folder `run`. Returns the model folder.

    `resume` continues a run from its last checkpoint, or begins it if there is none. Progress goes to `console` (rich).
    Raises ConfigError, OutputError, MismatchError before anything is trained; DivergedError when the loss stops being
    finite (the last checkpoint is kept); StoppedError after SIGTERM or Ctrl-C (a checkpoint is written first).
    """
    return Trainer(recipe, data, Path(run), resume=resume, overwrite=overwrite, console=console).run()


class Trainer:
    """One run; see the module's docstring."""

    def __init__(
        self, recipe: Recipe, data: Any, run: Path, *, resume: bool, overwrite: bool, console: Any = None
    ) -> None:
        self.recipe, self.settings = recipe, recipe.train
        self.stages = recipe.resolved()
        ends = [0]
        for _, held in self.stages:
            ends.append(ends[-1] + held.train.steps)
        self.spans, self.total = list(pairwise(ends)), ends[-1]
        source = open_source(data)
        self.source, held_out = split(source, recipe.data.validation)
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        self.accelerator = accelerator(self.settings.precision)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.console = console if self.main else None
        torch.manual_seed(self.settings.seed)
        self.model = build_model(recipe.model).to(self.device)
        if self.settings.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.facts = facts = {
            "path": str(data),
            "items": len(source),
            "fingerprint": source.fingerprint,
            "vistok": vistok.__version__,
        }
        if self.main:  # the model is built first, so that a recipe that does not fit it leaves no folder behind
            self.folder = RunFolder(run, recipe, facts, resume=resume, overwrite=overwrite)
        self.accelerator.wait_for_everyone()
        if not self.main:
            self.folder = RunFolder(run, recipe, facts, resume=True)
        self.held_out = torch.empty(0, 3, recipe.data.size, recipe.data.size, dtype=torch.uint8)
        if self.main and isinstance(self.model, (Tokenizer, Generator)):
            limit = len(held_out) if held_out else SHOWN
            self.held_out, self.held_labels = read_crops(held_out or self.source, recipe.data.size, limit)
        self.validates = held_out is not None
        self.resumed = self.folder.latest() if resume else None
        self.step = self.resumed.step if self.resumed else 0  # completed steps, all stages together
        self.stage = 0
        self.window: Tensor | None = None  # sums of the weighted terms and of the gradient's norm since the last row
        self.window_steps = 0
        self.terms: list[str] = []
        self.saved_at = self.step if self.resumed else -1
        self.ema: Ema | None = None
        self.signals = StopSignals()
        self.skipped: dict[str, str] = {}  # pictures that cannot be read, and why

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end. Returns the model folder."""
        self._prepare_weights()
        begun = self.resumed.step if self.resumed else None
        self.log = CsvLog(self.folder.path / "log.csv", begun) if self.main else None
        self.validation_log = CsvLog(self.folder.path / "validation.csv", begun) if self.main else None
        self.reference = Comparison.of_run(self.recipe, self.facts, self.log.path) if self.log is not None else None
        wanted = self.settings.tensorboard and self.main
        self.curves = Curves(self.folder.path / "tensorboard", wanted, self.step)
        self.display = Display(self.console, self.total, self.step)
        held = [recipe for _, recipe in self.stages]
        self.doctor = Doctor(self.folder.path, held, self.curves, self.display, begun, self.main)
        try:
            self._announce()
            with self.signals:
                for index, (first, last) in enumerate(self.spans):
                    if self.step < last:
                        self._run_stage(index, first, last)
            if self.skipped:
                told = next(iter(self.skipped.values()))
                self.display.note(f"{len(self.skipped)} pictures cannot be read and were skipped, such as: {told}")
            if self.saved_at != self.step:
                self._save()
            elif self.main and self.resumed and self.resumed.step == self.total:
                self.folder.save_model(self._evaluated())  # a kill may have come between the checkpoint and its model
            verdict = self.reference.verdict() if self.reference is not None else None
            if verdict is not None:
                self.display.note(verdict)
        finally:
            self.doctor.end()
            self.display.close()
            self.curves.close()
        return self.folder.model

    def _run_stage(self, index: int, first: int, last: int) -> None:
        stage, recipe = self.stages[index]
        self.stage = index
        self.model.train()
        self.model.zero_grad(set_to_none=True)  # what is frozen from here on must not count in the gradient's norm
        freeze(self.model, stage, self.trainable)
        optimizer = build_optimizer(self.model.parameters(), recipe.optimizer)
        objective, optimizer = self.accelerator.prepare(Objective(self.model), optimizer)
        if self.resumed and self.resumed.step > first and self.resumed.stage == index:
            self._load_state(optimizer, self.resumed.state)
        self.weights_fit = False
        self.doctor.begin(index, first, self.model)
        loader = self._rank_loader(recipe)
        batches = loader.batches(self.step)
        try:
            self._start_clock()
            while self.step < last:
                self._train_step(objective, optimizer, batches, recipe, first)
                self._after_step(optimizer, last)
        finally:
            batches.close()  # type: ignore[attr-defined]
            self.accelerator.free_memory()
            self.skipped |= loader.bad

    def _train_step(self, objective: Any, optimizer: Any, batches: Iterator, recipe: Recipe, first: int) -> None:
        step, settings = self.step, recipe.train
        waited = time.perf_counter()
        batch = place(next(batches), self.device, self.settings.channels_last)
        self.waited += time.perf_counter() - waited
        rate = learning_rate(recipe.optimizer, step - first, settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.rate, self.batch_size = rate, settings.batch_size
        rng = self._seeded(step)
        self.doctor.expect((step + 1) % self.settings.log_every == 0 or step + 1 == first + settings.steps)
        optimizer.zero_grad(set_to_none=True)
        values: Tensor | None = None
        for index, part in enumerate(parts(batch, settings.accumulate)):
            with nullcontext() if index == settings.accumulate - 1 else self.accelerator.no_sync(objective):
                weighted = self._weigh(objective(part, step, rng), recipe.loss)
                stacked = torch.stack([value.float() for value in weighted.values()]) / settings.accumulate
                values = stacked.detach() if values is None else values + stacked.detach()
                self.accelerator.backward(stacked.sum())
        assert values is not None
        self.accelerator.unscale_gradients(optimizer)
        self.doctor.observe(batch, weighted)
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in trained])  # type: ignore[misc]
        sums = torch.cat([values, norm.to(values).reshape(1)])
        self.latest_values = sums
        if self.device.type == "cpu":  # elsewhere only where a row or a checkpoint is due: looking costs a wait
            self._check()
        if recipe.optimizer.clip is not None:  # after the check, which would find every gradient spoilt by a NaN norm
            clip_grads_with_norm_(trained, recipe.optimizer.clip, norm)
        optimizer.step()
        if hasattr(self.model, "after_step"):
            self.model.after_step(step)
        if self.ema is not None:
            self.ema.update(self.model, step)
        self.window = sums if self.window is None else self.window + sums
        self.window_steps += 1
        self.step = step + 1

    def _after_step(self, optimizer: Any, last: int) -> None:
        """What happens between steps: rows, validation, samples, checkpoints, and the wish to stop."""
        settings, step, end = self.settings, self.step, self.step == self.total
        self.display.advance(step)
        logs = step % settings.log_every == 0 or step == last
        validates = _due(step, settings.validate_every, end)
        samples = _due(step, settings.sample_every, end)
        saves = _due(step, settings.checkpoint_every, end)
        stopping = self._stopping()
        if logs or saves or stopping:
            self._check()
        if logs:
            self._write_row()
        if validates or samples or saves or stopping:
            paused = time.perf_counter()
            if validates and self.validates:
                self._validate()
            if samples and len(self.held_out):
                self._sample()
            if saves or stopping:
                self._save(optimizer if step < last else None)
            self.clock += time.perf_counter() - paused
        if stopping and not end:
            raise StoppedError(f"stopped by {stopping} after step {step} of {self.total}; --resume continues")

    # -- pieces --------------------------------------------------------------------------------------------------

    def _prepare_weights(self) -> None:
        """Weights from the checkpoint, or fresh ones with whatever the model draws from data."""
        if self.resumed is None and self.recipe.model.init is None and hasattr(self.model, "initialise"):
            self.model.train()
            loader = self._loader(self.stages[0][1], rank=0, world=1)
            batches = loader.batches(0)
            try:
                with torch.no_grad():
                    placed = (place(batch, self.device, self.settings.channels_last) for batch in batches)
                    self.model.initialise(placed, self._seeded(-1, everywhere=True))
            finally:
                batches.close()  # type: ignore[attr-defined]
        if self.resumed:
            self.model.load_state_dict(self.resumed.model)
        if self.settings.ema is not None:
            self.ema = Ema(self.model, self.settings.ema)
            if self.resumed and self.resumed.ema:
                self.ema.averaged.load_state_dict(self.resumed.ema)

    def _loader(self, recipe: Recipe, rank: int, world: int) -> PixelLoader:
        data = recipe.data
        return PixelLoader(
            self.source,
            size=data.size,
            batch_size=recipe.train.batch_size,
            seed=self.settings.seed,
            crop=data.crop,
            flip=data.flip,
            turn=data.turn,
            scale=data.scale,
            workers=data.workers,
            rank=rank,
            world=world,
        )

    def _rank_loader(self, recipe: Recipe) -> PixelLoader:
        world = self.accelerator.num_processes
        if recipe.train.batch_size % (world * recipe.train.accumulate):
            raise ConfigError(
                f"train.batch_size {recipe.train.batch_size} is not a multiple of {world} processes times "
                f"train.accumulate {recipe.train.accumulate}"
            )
        return self._loader(recipe, self.accelerator.process_index, world)

    def _seeded(self, step: int, everywhere: bool = False) -> torch.Generator:
        seed = step_seed(self.settings.seed, step, 0 if everywhere else self.accelerator.process_index)
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def _weigh(self, terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
        names = list(terms)
        if names != self.terms:  # the means of another set of terms begin here
            self.window, self.window_steps, self.terms = None, 0, names
        if not self.weights_fit:
            for name in weights:
                if name not in terms:
                    hint = nearest(name, names) or f"; its terms: {', '.join(names)}"
                    raise ConfigError(f"loss.{name}: the model's loss has no such term{hint}")
            self.weights_fit = True
        return {name: value * weights[name] if name in weights else value for name, value in terms.items()}

    def _check(self) -> None:
        """Raise DivergedError, with the term or the parameter, unless the latest terms and gradient are finite."""
        scaled = self.settings.precision == "fp16"  # where infinite gradients are how the loss scale finds its size
        values = self.latest_values[:-1] if scaled else self.latest_values
        if bool(torch.isfinite(values).all()):
            return
        found = dict(zip(self.terms, values.tolist(), strict=False))  # the gradient's norm, the last, has no name
        names = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
        if names:
            told = f"loss term {', '.join(names)}"
        else:
            broken = (
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
            )
            told = f"the gradient of {next(broken, 'the loss')} is not finite"
        kept = checkpoints.steps_in(self.folder.checkpoints)
        rest = f"the checkpoint of step {kept[-1]} is kept" if kept else "there was no checkpoint yet"
        raise DivergedError(
            f"{told} at step {self.step}; {rest}. A lower optimizer.lr, a longer optimizer.warmup or a smaller "
            "optimizer.clip is the usual cure"
        )

    def _load_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.terms, self.window_steps = list(state["terms"]), state["window_steps"]
        self.window = None if state["window"] is None else state["window"].to(self.device)

    def _save(self, optimizer: Any = None) -> None:
        """A checkpoint and RUN/model. `optimizer` is None at a stage's end, where the next one has another."""
        if self.main:
            averaged = self.ema.current(self.model) if self.ema is not None else None
            scaler = self.accelerator.scaler
            window = self.window if self.window_steps else None
            state = {
                "optimizer": None if optimizer is None else optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "terms": self.terms,
                "window": None if window is None else window.cpu(),
                "window_steps": self.window_steps,
            }
            weights = averaged.state_dict() if averaged is not None else None
            written = Checkpoint(self.step, self.stage, self.model.state_dict(), weights, state)
            checkpoints.save(self.folder.checkpoints, written)
            self.folder.save_model(averaged if averaged is not None else self.model)
        self.saved_at = self.step
        self.accelerator.wait_for_everyone()

    def _evaluated(self) -> Any:
        return self.ema.current(self.model) if self.ema is not None else self.model

    def _validate(self) -> None:
        if self.main and len(self.held_out):
            model = self._evaluated()
            generates = isinstance(model, Generator)
            found = (
                generator_loss(model, self.held_out, self.held_labels) if generates else measure(model, self.held_out)
            )
            row = {"step": self.step, **found}
            assert self.validation_log is not None
            self.validation_log.add(row)
            self.doctor.validated(row)
            self.curves.scalars("validation", row)
            unit = "" if generates else " dB"
            told = "  ".join(f"{name} {value:.2f}{unit}" for name, value in row.items() if name != "step")
            self.display.note(f"step {self.step}: {told} on {len(self.held_out)} held-out pictures")

    def _sample(self) -> None:
        if self.main:
            model = self._evaluated()
            grid = generated_grid(model) if isinstance(model, Generator) else sample_grid(model, self.held_out)
            write_image(self.folder.path / "samples" / f"step-{self.step:08d}.png", grid)
            self.curves.image("samples", grid, self.step)

    def _write_row(self) -> None:
        assert self.window is not None
        means = self.window / self.window_steps
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        elapsed = time.perf_counter() - self.clock
        row: dict[str, Any] = {}
        if self.main:
            *values, norm = means.tolist()
            row |= {"step": self.step, "loss": math.fsum(values)}
            row |= dict(zip(self.terms, values, strict=True))
            row |= {"lr": self.rate, "grad_norm": norm}
            done = self.step - self.clock_step
            row |= {"images_per_second": done * self.batch_size / elapsed, "waiting": self.waited / elapsed}
            assert self.log is not None
            self.log.add(row)
            self.curves.scalars("train", row)
            self.display.row(row, self.terms)
            told = self.reference.add(self.step, row["loss"]) if self.reference is not None else None
            if told is not None:
                self.display.note(told)
        self.doctor.row(row, self.terms)
        self.window, self.window_steps = None, 0
        self._start_clock()

    def _start_clock(self) -> None:
        self.clock, self.clock_step, self.waited = time.perf_counter(), self.step, 0.0

    def _announce(self) -> None:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        self.display.note(
            f"{self.model.name}: {count / 1e6:.2f} M parameters on {self.device}, {len(self.source)} pictures"
            + (f", {len(self.held_out)} held out" if self.validates else ", too few to hold any out for validation")
        )
        if self.resumed:
            self.display.note(f"resumed after step {self.step} of {self.total}")

    def _stopping(self) -> str | None:
        """The signal that asks to stop, on every process as soon as one has received it."""
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(float(self.signals.received is not None), device=self.device)
            return (self.signals.received or "another process") if self.accelerator.reduce(asked, "sum") > 0 else None
        return self.signals.received


def _due(step: int, every: int, end: bool) -> bool:
    return end or (every > 0 and step % every == 0)
