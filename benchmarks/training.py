"""What the trainer costs: a training step inside `vistok train`, beside the same step written out by hand.

    python benchmarks/training.py [--data FOLDER] [--recipe strata/tiny] [--steps 100] [--rounds 3] [key=value ...]

By hand: batch from the same loader, the model's loss, backward, clipping, a fused AdamW step, EMA; no log, no checks,
no Accelerate. Both run in turns in one process and the best round of each counts, by the clock and by processor time,
which other programs on the machine disturb less. Without --data, the pictures are 64 random ones of 96 px as PNG.
Writes benchmarks/results/training.json; the bar is a ratio of 1.05.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vistok.data.loader import PixelLoader
from vistok.data.sources import open_source
from vistok.training.ema import Ema
from vistok.training.optimizer import build_optimizer
from vistok.training.prepare import build_model, place
from vistok.training.recipe import Recipe, load_recipe
from vistok.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "training.json"
EVERY = 10  # steps per logged row


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--recipe", default="strata/tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    fixed = [f"train.steps={given.steps}", f"train.log_every={EVERY}", "train.checkpoint_every=0"]
    fixed += ["train.validate_every=0", "train.sample_every=0", "data.validation=0"]
    recipe = load_recipe(given.recipe, [*given.overrides, *fixed])
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(given.data) if given.data else _pictures(Path(folder) / "pictures")
        rounds: dict[str, list[tuple[float, float]]] = {"by_hand": [], "trainer": []}
        for round_ in range(given.rounds):
            rounds["by_hand"].append(_by_hand(recipe, data))
            rounds["trainer"].append(_trained(recipe, data, Path(folder) / f"run{round_}"))
            told = (
                f"{name} {times[-1][0] * 1e3:.2f} ms ({times[-1][1] * 1e3:.2f} of CPU)"
                for name, times in rounds.items()
            )
            print(f"round {round_ + 1}: {', '.join(told)} a step", flush=True)
    best = {name: [min(column) for column in zip(*times, strict=True)] for name, times in rounds.items()}
    result = {
        "recipe": given.recipe,
        "batch_size": recipe.train.batch_size,
        "precision": recipe.train.precision,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "milliseconds": {name: {"clock": clock * 1e3, "cpu": cpu * 1e3} for name, (clock, cpu) in best.items()},
        "ratio": best["trainer"][0] / best["by_hand"][0],
        "ratio_cpu": best["trainer"][1] / best["by_hand"][1],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"ratio {result['ratio']:.3f}, of CPU time {result['ratio_cpu']:.3f} -> {RESULT}")


class Stopwatch:
    """Clock and processor time at every step."""

    def __init__(self) -> None:
        self.stamps: list[tuple[float, float]] = []

    def __call__(self, *_: Any) -> None:
        self.stamps.append((time.perf_counter(), time.process_time()))

    def per_step(self) -> tuple[float, float]:
        """Median seconds per step over windows of EVERY steps, the first left out."""
        marks = np.array(self.stamps)[EVERY - 1 :: EVERY]
        clock, cpu = np.median(np.diff(marks, axis=0), axis=0) / EVERY
        return float(clock), float(cpu)


def _by_hand(recipe: Recipe, data: Path) -> tuple[float, float]:
    """Seconds per step of the loop below."""
    settings = recipe.train
    torch.manual_seed(0)
    model = build_model(recipe.model)
    loader = PixelLoader(
        open_source(data),
        size=recipe.data.size,
        batch_size=settings.batch_size,
        crop=recipe.data.crop,
        flip=recipe.data.flip,
        turn=recipe.data.turn,
        scale=recipe.data.scale,
        workers=recipe.data.workers,
    )
    device = model.device
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if hasattr(model, "initialise"):
        with torch.no_grad():
            model.initialise(loader.batches(0), torch.Generator().manual_seed(0))
    model.train()
    ema = Ema(model, settings.ema) if settings.ema is not None else None
    optimizer = build_optimizer(model.parameters(), recipe.optimizer)
    rng, batches, watch = torch.Generator().manual_seed(0), loader.batches(0), Stopwatch()
    for step in range(settings.steps):
        batch = place(next(batches), device, settings.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = torch.stack(list(model.loss(batch, step, rng).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip or float("inf"))
        optimizer.step()
        if ema is not None:
            ema.update(model, step)
        watch()
    batches.close()  # type: ignore[attr-defined]
    return watch.per_step()


def _trained(recipe: Recipe, data: Path, run: Path) -> tuple[float, float]:
    """Seconds per step of `vistok train`, with its log, curves and checks."""
    watch = Stopwatch()
    model = Trainer(recipe, data, run, resume=False, overwrite=False)
    original = model._after_step

    def after_step(*arguments: Any) -> None:
        original(*arguments)
        watch()

    model._after_step = after_step  # type: ignore[method-assign]
    model.run()
    return watch.per_step()


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    random = np.random.RandomState(0)
    for index in range(64):
        small = random.randint(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


if __name__ == "__main__":
    main()
