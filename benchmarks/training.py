"""What the trainer costs, how long it waits for data, and what bf16 and activation checkpointing give.

    python benchmarks/training.py [SHAPE ...] [--data FOLDER] [--rounds 3] [--steps 10] [--out FILE]

Each shape is measured in arms that take turns, every one in a process of its own, on one thread:

    by hand     the parts of a step and nothing else, one after the other: batch from the same loader, the model's loss
                with its judges, backward, clip, a fused AdamW step, the discriminator's turn, the EMA
    trainer     the same recipe inside `vistok train`, with its log, checks, vitals and Accelerate
    recompute   the trainer with train.activation_checkpointing
    bf16        the trainer with train.precision bf16

The bar is a ratio of trainer to by hand of at most 1.05, in processor time, which other programs on the machine disturb
less than the clock. A time is the mean over the steps after the first two, the best round counts. Memory is the peak of
the process above what it held before the first step (weights and libraries): gradients, moments and what a forward pass
keeps. `waiting` is the share of the trainer's time that went by before a batch was there, at the default number of
decoding threads on JPEG files (generated ones of 288 px, unless --data names a folder). Writes
benchmarks/results/training.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "training.json"
WARM = 2  # steps at the start that are left out: allocations, moments

JUDGES: dict[str, Any] = {
    "perceptual": {"name": "steerable"},
    "adversary": {"discriminator": {"name": "patchgan"}, "adaptive": True, "lecam": 0.001, "optimizer": {"lr": 1e-4}},
}
NARROW = {"width": 192, "layers": 12, "heads": 3}
ARMS: dict[str, dict[str, Any]] = {
    "by hand": {},
    "trainer": {},
    "recompute": {"activation_checkpointing": True},
    "bf16": {"precision": "bf16"},
}
COST, MEMORY = ("by hand", "trainer"), ("trainer", "recompute", "bf16")
# Shape -> its arms and recipe. The published widths and depths at 64 px instead of 256, for what the trainer costs; and
# narrow nets on larger pictures for memory, where what a forward pass keeps outweighs the weights.
SHAPES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "vq-16": (COST, {"model": {"name": "vqgan-llamagen-f16"}, "data": {"size": 64}, **JUDGES}),
    "titok-b": (
        COST,
        {
            "model": {"name": "titok-b-64", "legacy": False, "pixel_decoder": None, "image_size": 64},
            "data": {"size": 64},
            **JUDGES,
        },
    ),
    "strata-tiny": (
        COST,
        {
            "model": {"name": "strata-tiny"},
            "data": {"size": 64, "scale": [0.2, 1.0], "turn": True},
            "train": {"batch_size": 16, "channels_last": True},
        },
    ),
    "vq-16-narrow": (
        MEMORY,
        {
            "model": {
                "name": "vqgan-llamagen-f16",
                "cnn": {"width": 32, "multipliers": [1, 1, 2, 2, 4], "attention": [4]},
            },
            "data": {"size": 128},
            "train": {"batch_size": 4},
        },
    ),
    "titok-narrow": (
        MEMORY,
        {
            "model": {
                "name": "titok-b-64", "legacy": False, "pixel_decoder": None, "image_size": 128, "encoder_patch": 8,
                "decoder_patch": 8, "encoder": NARROW, "decoder": NARROW,
            },
            "data": {"size": 128},
            "train": {"batch_size": 4},
        },
    ),
}  # fmt: skip


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="after the first two")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", nargs=4, metavar=("SHAPE", "ARM", "DATA", "RUN"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        shape, arm, data, run = given.one
        print(json.dumps(_measure(_recipe(shape, arm, given.batch, given.steps), arm, Path(data), Path(run))))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(given.data) if given.data else _pictures(Path(folder) / "pictures")
        for shape in given.shapes or SHAPES:
            _keep(given, shape, _shape(shape, given, data, Path(folder)))


def _keep(given: argparse.Namespace, shape: str, found: dict[str, Any]) -> None:
    """Add a shape to the result file, which keeps those of other runs."""
    import torch

    found |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, one thread",
        "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "pictures": "a folder of JPEGs" if given.data else "generated JPEGs",
    }
    shapes = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(shapes | {shape: found}, indent=2) + "\n")
    print(f"{shape} -> {given.out}", flush=True)


def _shape(shape: str, given: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    arms, recipe = SHAPES[shape]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for round_ in range(given.rounds):
        for arm in arms if round_ % 2 == 0 else reversed(arms):
            run = folder / f"{shape}-{arm.replace(' ', '-')}-{round_}"
            command = [sys.executable, __file__, "--steps", str(given.steps), "--batch", str(given.batch)]
            done = subprocess.run(
                [*command, "--one", shape, arm, str(data), str(run)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                check=True,
            )
            found[arm].append(json.loads(done.stdout))
            told = "  ".join(f"{key} {value:.4g}" for key, value in found[arm][-1].items())
            print(f"{shape}, round {round_ + 1}, {arm}: {told}", flush=True)
    best = {arm: {key: min(one[key] for one in rounds) for key in rounds[0]} for arm, rounds in found.items()}
    batch = recipe.get("train", {}).get("batch_size", given.batch)
    result: dict[str, Any] = {"recipe": recipe, "batch": batch, "rounds": given.rounds, "best": best}
    trainer = best.get("trainer")
    if trainer and "by hand" in best:
        result["trainer_to_by_hand"] = {key: trainer[key] / best["by hand"][key] for key in ("cpu_ms", "clock_ms")}
        print(f"{shape}: trainer to by hand {result['trainer_to_by_hand']}")
    for arm in ("recompute", "bf16"):
        if trainer and arm in best:
            result[f"{arm}_to_trainer"] = {key: best[arm][key] / trainer[key] for key in ("cpu_ms", "memory_mb")}
            print(f"{shape}: {arm} to trainer {result[f'{arm}_to_trainer']}")
    return result


# -- one arm, in a process of its own --------------------------------------------------------------------------------


def _recipe(shape: str, arm: str, batch: int, steps: int) -> Any:
    from vistok.training.recipe import check

    given = SHAPES[shape][1]
    train = {"batch_size": batch} | given.get("train", {}) | ARMS[arm]
    train |= {"steps": WARM + steps + 1, "threads": 1, "ema": 0.999, "log_every": WARM + steps}
    train |= {"checkpoint_every": 0, "validate_every": 0, "sample_every": 0}
    fixed = {"optimizer": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 1e-4}, "train": train}
    return check({**given, **fixed, "data": {**given["data"], "validation": 0}}, shape)


class Watch:
    """Clock, processor time and memory at the end of every step."""

    def __init__(self) -> None:
        self.stamps: list[tuple[float, float]] = []
        self.before = _resident()

    def __call__(self) -> None:
        self.stamps.append((time.perf_counter(), time.process_time()))

    def result(self) -> dict[str, float]:
        """Milliseconds a step, and the peak of memory in MB above `before`."""
        first, last = self.stamps[WARM - 1], self.stamps[-1]
        clock, cpu = ((last[i] - first[i]) / (len(self.stamps) - WARM) * 1e3 for i in (0, 1))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"cpu_ms": cpu, "clock_ms": clock, "memory_mb": (peak - self.before) / 1e6}


def _resident() -> int:
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def _measure(recipe: Any, arm: str, data: Path, run: Path) -> dict[str, float]:
    return _by_hand(recipe, data) if arm == "by hand" else _trained(recipe, data, run)


def _by_hand(recipe: Any, data: Path) -> dict[str, float]:
    import torch

    from vistok.data.loader import PixelLoader
    from vistok.data.sources import open_source
    from vistok.losses.adversarial import AdversarialLoss
    from vistok.losses.discriminators import build_discriminator
    from vistok.losses.perceptual import build_perceptual
    from vistok.training.ema import Ema
    from vistok.training.optimizer import build_optimizer
    from vistok.training.prepare import build_model, place

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, settings, section = build_model(recipe.model), recipe.train, recipe.data
    loader = PixelLoader(
        open_source(data),
        size=section.size,
        batch_size=settings.batch_size,
        flip=section.flip,
        turn=section.turn,
        scale=section.scale,
    )
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if hasattr(model, "initialise"):
        with torch.no_grad():
            model.initialise(loader.batches(0), torch.Generator().manual_seed(0))
    adversary = None
    if recipe.adversary is not None:
        given = recipe.adversary
        adversary = AdversarialLoss(
            build_discriminator(given.discriminator["name"]), adaptive=given.adaptive, lecam=given.lecam
        )
        model.judge(adversary, build_perceptual(recipe.perceptual.name))
        judging = build_optimizer(adversary.parameters(), recipe.adversary_optimizer(given))
    model.train()
    watch, ema = Watch(), Ema(model, settings.ema)
    optimizer = build_optimizer(model.parameters(), recipe.optimizer)
    rng, batches = torch.Generator().manual_seed(0), loader.batches(0)
    for step in range(settings.log_every):
        batch = place(next(batches), model.device, settings.channels_last)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(model.loss(batch, step, rng).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if adversary is not None:
            judging.zero_grad(set_to_none=True)
            model.discriminator_loss(batch, step).backward()
            torch.nn.utils.clip_grad_norm_(adversary.parameters(), 1.0)
            judging.step()
        ema.update(model, step)
        watch()
    batches.close()  # type: ignore[attr-defined]
    return watch.result()


class Done(Exception):
    """Enough steps: nothing that a run leaves at its end is of interest."""


def _trained(recipe: Any, data: Path, run: Path) -> dict[str, float]:
    from vistok.training.trainer import Trainer

    trainer = Trainer(recipe, data, run, resume=False, overwrite=False)
    watch, original, waited = Watch(), trainer._after_step, []

    def after_step(last: int) -> None:
        waited.append(trainer.report.waited)
        original(last)
        watch()
        if trainer.step == recipe.train.log_every:
            raise Done

    trainer._after_step = after_step  # type: ignore[method-assign]
    with suppress(Done):
        trainer.run()
    elapsed = watch.stamps[-1][0] - watch.stamps[WARM - 1][0]
    return watch.result() | {"waiting": (waited[-1] - waited[WARM - 1]) / elapsed}


def _pictures(folder: Path) -> Path:
    """64 JPEG files of 288 px, busy enough that decoding them costs what photographs cost."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.RandomState(0)
    for index in range(64):
        small = random.randint(0, 256, (36, 36, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((288, 288), Image.Resampling.BICUBIC)
        noise = random.normal(0, 6, (288, 288, 3))
        Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype("uint8")).save(
            folder / f"{index}.jpg", quality=92
        )
    return folder


if __name__ == "__main__":
    main()
