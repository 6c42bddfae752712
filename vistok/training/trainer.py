"""The loop: batches in, weights out, and nothing between that a resumed run would do differently.

    batch(step) -> step.py: losses, backward, clip, optimizers -> EMA
    every so often: a row of the log, validation, samples, a checkpoint

Batches, random numbers and the learning rate are pure functions of (seed, step), so weights, moments and the step are
all that a run has to remember: killed at any moment and resumed, it ends in the same bits (on the CPU; on a GPU as far
as its kernels are deterministic). A model knows nothing of this file. It has

    loss(batch, step, rng) -> {term: scalar}      batch as PixelLoader gives it, on the model's device
    initialise(batches, rng)                      optional, once before step 0: codebooks from data, and the like
    after_step(step)                              optional, after every optimizer step
    learn_from({role: model}, fresh)              optional: teachers, which it does not own; if `fresh`, it may take
                                                  weights of theirs
    started()                                     optional: weights were taken from an earlier stage's model
    judge(adversary=, perceptual=)                optional: judges of its reconstructions, which it does not own
    discriminator_loss(batch, step)               their turn, with what `loss` put into the batch

A recipe's stages may train several models, one after the other: each is kept in RUN/stages, for those that start from
its weights or learn from it.

rng is a torch.Generator on the model's device, seeded for the step; torch's global one is too.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.data.clips import Alternating, ClipLoader, ClipSource
from vistok.data.loader import PixelLoader
from vistok.data.token_loader import StoreSource, TokenLoader
from vistok.errors import ConfigError, VistokError, nearest
from vistok.generator import Generator
from vistok.registry import system_of
from vistok.tokenizer import Tokenizer
from vistok.training import checkpoint as checkpoints
from vistok.training.checkpoint import Checkpoint, step_seed
from vistok.training.ema import Ema
from vistok.training.judges import Judges, check_judges
from vistok.training.prepare import (
    Objective,
    StopSignals,
    accelerator,
    build_model,
    check_conditions,
    check_stored,
    check_tokenizer,
    compile_parts,
    config_of,
    freeze,
    place,
    recompute,
    start_from,
    suit,
    teach,
)
from vistok.training.recipe import ModelSection, Recipe
from vistok.training.report import Report
from vistok.training.run import RunFolder
from vistok.training.sharding import Shards, asked, check_possible
from vistok.training.step import DivergedError as DivergedError
from vistok.training.step import Step
from vistok.training.validation import (
    SHOWN,
    generated_grid,
    generator_loss,
    measure,
    open_data,
    read_held,
    sample_grid,
    split,
)


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
    """Train by a recipe on `data` in the folder `run`: what `open_source` takes, or for generators a token store.

    Returns the model folder.

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
        source = open_data(data)
        self.source, held_out = split(source, recipe.data.validation)
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        self.sharded = asked(self.settings.fsdp)
        self.accelerator = accelerator(self.settings.precision)
        if self.sharded:
            check_possible(self.accelerator)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.console = console if self.main else None
        for _, held in self.stages:
            check_conditions(held, source)
            if isinstance(source, StoreSource):
                check_stored(held, source.made_by.name)
            else:
                check_tokenizer(held)
        self._build(self.stages[0][1].model)
        for _, held in self.stages:  # so that a later stage's mistake shows now
            if held.model.name is not None:
                config_of(held.model)
            named = system_of(held.model.name)[0].model if held.model.name is not None else None
            check_judges(held, type(self.model) if held.model == self.section else named)
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
        self.held: dict[str, Any] = {}  # a batch of held-out items
        if self.main and isinstance(self.model, (Tokenizer, Generator)):
            limit = len(held_out) if held_out else SHOWN
            self.held = read_held(held_out or self.source, recipe.data.size, limit)
        self.validates = held_out is not None
        self.resumed = self.folder.latest() if resume else None
        self.step = self.resumed.step if self.resumed else 0  # completed steps, all stages together
        self.stage = self.resumed.stage if self.resumed else 0
        self.saved_at = self.step if self.resumed else -1
        self.ema: Ema | None = None
        self.shards: Shards | None = None
        self.left = ""  # what a model that starts from another one did not find there
        self.signals = StopSignals()
        self.skipped: dict[str, str] = {}  # pictures that cannot be read, and why

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end. Returns the model folder."""
        self._enter(self.stage)
        begun = self.resumed.step if self.resumed else None
        items = len(self.source)
        self.report = Report(self.folder, self.recipe, self.facts, items, begun, self.main, self.console, self._shared)
        try:
            self._announce()
            with self.signals:
                for index, (first, last) in enumerate(self.spans):
                    if self.step < last:
                        if self.stages[index][1].model != self.section:
                            self._build(self.stages[index][1].model)
                            self._enter(index)
                        self._run_stage(index, first, last)
            if self.skipped:
                told = next(iter(self.skipped.values()))
                self.report.note(f"{len(self.skipped)} pictures cannot be read and were skipped, such as: {told}")
            if self.saved_at != self.step:
                self._save()
            elif self.resumed and self.resumed.step == self.total:
                model = self._evaluated()
                if self.main:
                    self.folder.save_model(model)  # a kill may have come between the checkpoint and its model
            self.report.verdict()
        finally:
            self.report.close()
        return self.folder.model

    def _run_stage(self, index: int, first: int, last: int) -> None:
        stage, recipe = self.stages[index]
        self.stage = index
        self.model.train()
        self.model.zero_grad(set_to_none=True)  # what is frozen from here on must not count in the gradient's norm
        freeze(self.model, stage, self.trainable)
        if self.shards is not None:
            self.shards.refreeze()
        if recipe.teachers != self.taught:
            self._teach(recipe, fresh=False)
        torch.manual_seed(step_seed(self.settings.seed, -2 - index))  # the discriminators' first weights
        judges = Judges(recipe, first, self.device)
        judges.attach(self.model)
        self.report.doctor.begin(index, first, self.model, judges.modules())
        self.report.epochs.watch(self.model)
        looks = self.device.type == "cpu"  # elsewhere only where a row or a checkpoint is due
        self.taking = Step(self.model, recipe, first, self.accelerator, judges, self.report.doctor, looks, self.shards)
        if self.resumed and self.resumed.step > first and self.resumed.stage == index:
            self.taking.load_state_dict(self.resumed.state)
            self.report.load_state_dict(self.resumed.state, self.device)
        loader = self._rank_loader(recipe)
        batches = loader.batches(self.step)
        try:
            self.report.start_clock(self.step)
            while self.step < last:
                waited = time.perf_counter()
                batch = place(next(batches), self.device, self.settings.channels_last)
                self.report.waited += time.perf_counter() - waited
                self._train_step(batch, recipe, first)
                self._after_step(last)
        finally:
            batches.close()  # type: ignore[attr-defined]
            self.accelerator.free_memory()
            self.skipped |= loader.bad

    def _train_step(self, batch: dict[str, Any], recipe: Recipe, first: int) -> None:
        step = self.step
        self.batch_size = recipe.train.batch_size
        every, left = self.taking.judges.model_every, first + recipe.train.steps - step
        self.report.doctor.expect(min(left, self.settings.log_every - step % self.settings.log_every) <= every)
        with self._telling():
            outcome = self.taking.take(batch, step, self._seeded(step))
        if self.ema is not None:
            self.ema.update(self.model, step)
        elif self.shards is not None:
            self.shards.follow(step)
        self.report.add(outcome)
        self.step = step + 1

    def _after_step(self, last: int) -> None:
        """What happens between steps: rows, validation, samples, checkpoints, and the wish to stop."""
        settings, step, end = self.settings, self.step, self.step == self.total
        self.report.display.advance(step)
        self.report.epochs.after(step, self.batch_size)
        logs = step % settings.log_every == 0 or step == last
        validates = _due(step, settings.validate_every, end)
        samples = _due(step, settings.sample_every, end)
        saves = _due(step, settings.checkpoint_every, end)
        stopping = self._stopping()
        if logs or saves or stopping:
            with self._telling():
                self.taking.check(step - 1)
        if logs:
            self.report.row(step, self.taking.rate, self.batch_size)
        if validates or samples or saves or stopping or step == last:
            paused = time.perf_counter()
            if validates and self.validates:
                self._validate()
            if samples:
                self._sample()
            if step == last and len(self.stages) > 1:
                model = self._evaluated()
                if self.main:
                    self.folder.save_model(model, f"stages/{self.stages[self.stage][0].name}")
            if saves or stopping:
                self._save(within=step < last)
            self.report.clock += time.perf_counter() - paused
        if stopping and not end:
            raise StoppedError(f"stopped by {stopping} after step {step} of {self.total}; --resume continues")

    # -- pieces --------------------------------------------------------------------------------------------------

    def _build(self, section: ModelSection) -> None:
        torch.manual_seed(self.settings.seed)
        self.section = section
        self.model = build_model(section).to(self.device)
        if isinstance(self.model, Generator) and len(self.source.classes) == self.model.classes:
            self.model.class_names = tuple(self.source.classes)
        if isinstance(self.source, StoreSource):
            suit(self.model, self.source.batch([0])["tokens"])
        if self.settings.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _enter(self, index: int) -> None:
        """Give the model of stage `index` its weights (a checkpoint's, an earlier stage's, or fresh ones and what they
        draw from data), its average, and what is laid over its modules.
        """
        _, recipe = self.stages[index]
        if recipe.model != self.section:
            self._build(recipe.model)
        resumed = self.resumed if self.resumed is not None and self.resumed.stage == index else None
        source = recipe.model.start_from
        if resumed is None and source is not None:
            left = start_from(self.model, self._model_of(source))
            self.left = f"starts from {source!r}" + (f", but for {', '.join(left[:6])}" if left else "")
        self._teach(recipe, fresh=resumed is None)
        if resumed is None and recipe.model.init is None and source is None and hasattr(self.model, "initialise"):
            self.model.train()
            loader = self._loader(recipe, rank=0, world=1)
            batches = loader.batches(self.step)
            try:
                with torch.no_grad():
                    placed = (place(batch, self.device, self.settings.channels_last) for batch in batches)
                    self.model.initialise(placed, self._seeded(-1, everywhere=True))
            finally:
                batches.close()  # type: ignore[attr-defined]
        if resumed is not None:
            self.model.load_state_dict(resumed.model)
        self.ema, self.shards = None, None
        plain = copy.deepcopy(self.model).eval() if self.sharded and self.main else None
        if self.settings.ema is not None and not self.sharded:
            self.ema = Ema(self.model, self.settings.ema)
            if resumed is not None and resumed.ema:
                self.ema.averaged.load_state_dict(resumed.ema)
        if self.settings.activation_checkpointing and not recompute(self.model):
            raise ConfigError(f"train.activation_checkpointing: {self.model.name} has no stack of blocks to recompute")
        if self.settings.compile:
            compile_parts(self.model)
        if self.sharded:
            self.shards = Shards(Objective(self.model), self.accelerator, self.settings.ema, plain)
            if resumed is not None and resumed.ema:
                self.shards.load_average(resumed.ema)

    def _teach(self, recipe: Recipe, fresh: bool) -> None:
        self.taught = recipe.teachers
        teach(self.model, recipe.teachers, self._model_of, fresh)

    def _model_of(self, name: str) -> Any:
        """The model of an earlier stage, or whatever else has that name. Raises as `vistok.load`."""
        stages = [stage.name for stage, _ in self.stages]
        path = self.folder.path / "stages" / name
        self.accelerator.wait_for_everyone()
        return vistok.load(str(path) if name in stages else name).to(self.device)

    def _loader(self, recipe: Recipe, rank: int, world: int) -> Any:
        data = recipe.data
        options: dict[str, Any] = {
            "size": data.size,
            "seed": self.settings.seed,
            "crop": data.crop,
            "flip": data.flip,
            "turn": data.turn,
            "scale": data.scale,
            "workers": data.workers,
            "rank": rank,
            "world": world,
        }
        batch = recipe.train.batch_size
        if isinstance(self.source, StoreSource):
            return TokenLoader(self.source, batch_size=batch, seed=self.settings.seed, rank=rank, world=world)
        if data.frames is None:
            return PixelLoader(self.source, batch_size=batch, **options)
        if data.clips is None:
            return ClipLoader(self.source, frames=data.frames, batch_size=batch, **options)
        clips = ClipLoader(
            ClipSource.below(data.clips), frames=data.frames, batch_size=data.clip_batch or batch, **options
        )
        return Alternating(PixelLoader(self.source, batch_size=batch, **options), clips)

    def _rank_loader(self, recipe: Recipe) -> Any:
        world = self.accelerator.num_processes
        if recipe.train.batch_size % (world * recipe.train.accumulate):
            raise ConfigError(
                f"train.batch_size {recipe.train.batch_size} is not a multiple of {world} processes times "
                f"train.accumulate {recipe.train.accumulate}"
            )
        return self._loader(recipe, self.accelerator.process_index, world)

    def _seeded(self, step: int, everywhere: bool = False) -> torch.Generator:
        seed = step_seed(self.settings.seed, step, 0 if everywhere else self.accelerator.process_index)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch's own also keeps a stack trace for each accelerator
        else:
            torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What a user can still do, added to the news that the run has diverged."""
        try:
            yield
        except DivergedError as error:
            kept = checkpoints.steps_in(self.folder.checkpoints)
            rest = f"the checkpoint of step {kept[-1]} is kept" if kept else "there was no checkpoint yet"
            raise DivergedError(
                f"{error}; {rest}. A lower optimizer.lr, a longer optimizer.warmup or a smaller optimizer.clip is the "
                "usual cure"
            ) from error

    def _save(self, within: bool = False) -> None:
        """A checkpoint and RUN/model. `within` a stage, moments and judges too: the next one has its own."""
        weights = self.model.state_dict() if self.shards is None else self.shards.state()
        averaged = None
        if self.shards is not None:
            averaged = self.shards.averaged_state(weights) if self.settings.ema is not None else None
            model = self.shards.whole(averaged or weights)
        else:
            model = self._evaluated()
            averaged = model.state_dict() if self.ema is not None else None
        state = self.report.state_dict() | (self.taking.state_dict() if within else {})
        if self.main:
            checkpoints.save(self.folder.checkpoints, Checkpoint(self.step, self.stage, weights, averaged, state))
            self.folder.save_model(model)
        self.saved_at = self.step
        self.accelerator.wait_for_everyone()

    def _shared(self, sums: Tensor) -> Tensor:
        """The mean over processes of what each has summed over its share of the batches."""
        return self.accelerator.reduce(sums, "mean") if self.accelerator.num_processes > 1 else sums

    def _evaluated(self) -> Any:
        """The model to validate and to save. With shards: for all processes to call, and the main one's alone."""
        if self.shards is not None:
            return self.shards.whole()
        return self.ema.current(self.model) if self.ema is not None else self.model

    def _validate(self) -> None:
        model = self._evaluated()
        if self.main and self.held_count:
            generates = isinstance(model, Generator)
            found = generator_loss(model, self.held) if generates else measure(model, self.held["pixels"])
            self.report.validation(self.step, found, self.held_count, "" if generates else " dB")
            self._keep_best(found, model)

    def _keep_best(self, row: dict[str, float], model: Any) -> None:
        """RUN/best, where this row of the validation is the best of the last model so far."""
        name = self.settings.best
        if name is None or self.stages[self.stage][1].model != self.stages[-1][1].model:
            return
        if name not in row:
            hint = nearest(name, list(row)) or f"; it has {', '.join(row)}"
            raise ConfigError(f"train.best: validation has no {name!r}{hint}")
        before = self.folder.best(name)
        better = 1.0 if name.startswith("psnr") else -1.0
        if before is None or before[0] >= self.step or better * row[name] > better * before[1]:
            self.folder.save_best(model, self.step, name, row[name])

    def _sample(self) -> None:
        model = self._evaluated()
        if self.main and isinstance(model, Generator):
            if model.tokenizer is not None:  # else nobody here can decode what it makes
                captions = self.held.get("caption", []) if getattr(model.config, "text", None) else []
                self.report.samples(self.step, generated_grid(model, captions))
        elif self.main and self.held_count:
            self.report.samples(self.step, sample_grid(model, self.held["pixels"]))

    @property
    def held_count(self) -> int:
        """How many items are held out, or shown where none are."""
        return len(next(iter(self.held.values()), ()))

    def _announce(self) -> None:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        self.report.note(
            f"{self.model.name}: {count / 1e6:.2f} M parameters on {self.device}, {len(self.source)} pictures"
            + (f", {self.held_count} held out" if self.validates else ", too few to hold any out for validation")
        )
        if self.left:
            self.report.note(f"{self.model.name} {self.left}")
        if self.resumed:
            self.report.note(f"resumed after step {self.step} of {self.total}")

    def _stopping(self) -> str | None:
        """The signal that asks to stop, on every process as soon as one has received it."""
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(float(self.signals.received is not None), device=self.device)
            return (self.signals.received or "another process") if self.accelerator.reduce(asked, "sum") > 0 else None
        return self.signals.received


def _due(step: int, every: int, end: bool) -> bool:
    return end or (every > 0 and step % every == 0)
