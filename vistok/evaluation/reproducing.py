"""Running a reproduction: every arm for every seed, each result on disk as it comes, then the verdict.

DIR/plan.json                claim, arms, budget, rule and data, from before the first arm starts
DIR/seed-0/ARM/numbers.json  what the arm gave; an arm that has one is not run again
DIR/seed-0/ARM/NAME/         runs of the trainer, which go on where they were killed
DIR/shared/NAME/             what all arms use (a teacher), trained once
DIR/SLUG.json                the result: plan, numbers, ratios to the baseline, verdict, environment
"""

import hashlib
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import vistok
from vistok.data.items import Source
from vistok.data.sources import open_source
from vistok.environment import environment
from vistok.errors import FormatError, InputError, MismatchError, OutputError
from vistok.evaluation.reproduction import VERSION, Numbers, Reproduction, judged
from vistok.files import write_atomically
from vistok.inventory import PACKAGE
from vistok.training.recipe import check
from vistok.training.trainer import StoppedError, train
from vistok.training.validation import read_crops

DATA = "VISTOK_DATA"  # the environment variable that names the folder of data sets
BESIDE = PACKAGE.parents[1] / "shared" / "data"  # where a checkout may have them


@dataclass(frozen=True)
class Data:
    """The two halves of a data set, opened, and what a reproduction has besides (`Reproduction.sources`), by name."""

    train: Source
    test: Source
    others: Mapping[str, Source] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Names, sizes and fingerprints, as JSON values."""
        sources = {"train": self.train, "test": self.test, **self.others}
        return {
            half: {"name": source.name, "items": len(source), "fingerprint": source.fingerprint}
            for half, source in sources.items()
        }


def find_data(reproduction: Reproduction, where: str | Path | None = None) -> Data:
    """The data of a reproduction: below `where`, else below $VISTOK_DATA, else below `shared/data` beside a checkout.

    Raises InputError that says which files were looked for, and where.
    """
    root = Path(where or os.environ.get(DATA) or BESIDE).expanduser()
    wanted = list(dict.fromkeys((reproduction.train, reproduction.test, *reproduction.also)))
    missing = [path for path in wanted if not (root / path).exists()]
    if missing:
        raise InputError(
            f"{root} lacks {' and '.join(missing)}, which the reproduction of {reproduction.slug} learns and is tested "
            f"on; --data or ${DATA} names the folder that holds {' and '.join(wanted)}"
        )
    if reproduction.sources is None:
        return Data(open_source(root / reproduction.train), open_source(root / reproduction.test))
    opened = dict(reproduction.sources(root))
    return Data(opened.pop("train"), opened.pop("test"), opened)


class Context:
    """What an arm is given: its budget, the data, and the trainer. `tell` says a line to whoever watches."""

    def __init__(self, reproduction: Reproduction, data: Data, root: Path, arm: str, seed: int, console: Any) -> None:
        self.data, self.seed, self.arm = data, seed, arm
        self.steps, self.batch = reproduction.steps_of(arm), reproduction.batch
        self.folder, self._shared = root / f"seed-{seed}" / arm, root / "shared"
        self.console = console

    def train(self, recipe: Mapping[str, Any], name: str = "model") -> Any:
        """A model trained by a recipe (as YAML would give it) within the budget; loaded, in evaluation mode.

        Seed, steps and batch are the arm's. Goes on where it was killed.
        """
        budget = {"steps": self.steps, "batch_size": self.batch, "seed": self.seed}
        return self._train(recipe, budget, self.folder / name)

    def shared(self, name: str, recipe: Mapping[str, Any], steps: int) -> Any:
        """A model that all arms and seeds use, trained once, with seed 0."""
        return self._train(recipe, {"steps": steps, "batch_size": self.batch, "seed": 0}, self._shared / name)

    def test_pixels(self, size: int, limit: int) -> tuple[Tensor, Tensor]:
        """Centre crops of the first test pictures, uint8 (n, 3, size, size), and their labels (n,)."""
        return read_crops(self.data.test, size, limit)

    def train_pixels(self, size: int, limit: int) -> tuple[Tensor, Tensor]:
        """The same of the first training pictures."""
        return read_crops(self.data.train, size, limit)

    def tell(self, text: str) -> None:
        """Say a line."""
        if self.console is not None:
            self.console.print(f"  {text}", markup=False)

    def _train(self, recipe: Mapping[str, Any], budget: dict[str, Any], folder: Path) -> Any:
        quiet = {"log_every": 100, "checkpoint_every": 250, "sample_every": 0, "validate_every": 0, "threads": 1}
        settings = quiet | {"tensorboard": False} | dict(recipe.get("train", {})) | budget
        data = {"validation": 0} | dict(recipe.get("data", {}))
        whole = {**recipe, "data": data, "train": settings}
        return vistok.load(train(check(whole, self.arm), self.data.train, folder, resume=True, console=self.console))


def reproduce(
    reproduction: Reproduction,
    data: Data,
    folder: Path,
    *,
    seeds: int | None = None,
    console: Any = None,
) -> dict[str, Any]:
    """Run what is not there yet, judge, write `folder`/SLUG.json and return what it holds.

    Killed at any moment, the same call goes on; more seeds may be asked for later.
    Raises MismatchError for a folder of another plan or other data, OutputError for one that holds something else.
    """
    seeds = reproduction.seeds if seeds is None else seeds
    if seeds < 2:
        raise InputError(f"seeds={seeds}; a verdict needs at least two")
    plan = reproduction.plan() | {"data": data.facts(), "code": code_fingerprint(reproduction)}
    _begin(folder, plan)
    runs = reproduction.runs(seeds)
    progress = _Progress(reproduction, runs, console)
    numbers: dict[str, dict[int, Numbers]] = {}
    spent: dict[str, list[dict[str, Any]]] = {}
    for seed, arm in runs:
        path = folder / f"seed-{seed}" / arm / "numbers.json"
        if path.exists():
            found = _read(path)
            progress.skip(arm, seed)
        else:
            progress.begin(arm, seed)
            context = Context(reproduction, data, folder, arm, seed, console)
            found = _measured(reproduction.arms[arm].run, seed, context)
            write_atomically(path, _json(found))
            progress.end(arm, seed, found["numbers"])
        numbers.setdefault(arm, {})[seed] = {
            name: math.nan if value is None else value for name, value in found["numbers"].items()
        }
        spent.setdefault(arm, []).append({key: value for key, value in found.items() if key != "numbers"})
    result = {"version": VERSION, **plan, "seeds": seeds, **judged(reproduction, numbers)}
    for arm, entries in spent.items():
        result["arms"][arm]["spent"] = entries
    result["environment"] = environment()
    write_atomically(folder / f"{reproduction.slug}.json", _json(result))
    return result


def result_file(slug: str) -> Path:
    """Where the result that the docs show lies: beside the reproduction's code."""
    return PACKAGE / "reproductions" / f"{slug.replace('-', '_')}.json"


def code_fingerprint(reproduction: Reproduction) -> str:
    """SHA-256 of the source of the arms' module, 16 hex digits."""
    run: Any = next(iter(reproduction.arms.values())).run
    while isinstance(run, partial):
        run = run.func
    return hashlib.sha256(inspect.getsource(sys.modules[run.__module__]).encode()).hexdigest()[:16]


# -- inside ------------------------------------------------------------------------------------------------------------


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / "plan.json"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not path.exists())):
        raise OutputError(f"{folder} is not empty and holds no reproduction; choose another folder")
    if not path.exists():
        write_atomically(path, _json(plan))
        return
    there = _read(path)
    changed = [key for key in plan if there.get(key) != json.loads(_json(plan))[key]]
    if changed:
        raise MismatchError(
            f"{folder} was begun with another plan ({', '.join(changed)} differ); results of both must not mix, so "
            "choose another folder"
        )


def _measured(run: Callable[[int, Context], Numbers], seed: int, context: Context) -> dict[str, Any]:
    again = context.folder.exists()
    wall, processor = time.perf_counter(), time.process_time()
    try:
        numbers = run(seed, context)
    except StoppedError as error:
        raise StoppedError(f"stopped within {context.arm}, seed {seed}; the same command goes on from there") from error
    return {
        "numbers": {name: float(value) for name, value in numbers.items()},
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "interrupted": again,
        "peak_memory_mb": _peak_memory(),
    }


def _peak_memory() -> int | None:
    """Of the process so far, in MB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def _json(document: Any) -> bytes:
    return (json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}); remove it, and it is made anew") from error


class _Progress:
    """A line before and after every arm, with the time left; the trainer shows its own bar in between."""

    def __init__(self, reproduction: Reproduction, runs: list[tuple[int, str]], console: Any) -> None:
        self.slug, self.console, self.total = reproduction.slug, console, len(runs)
        self.minutes = {name: arm.minutes for name, arm in reproduction.arms.items()}
        self.left = sum(self.minutes[arm] for _, arm in runs)
        self.done, self.planned, self.began = 0, 0.0, time.perf_counter()

    def skip(self, arm: str, seed: int) -> None:
        self.done += 1
        self.left -= self.minutes[arm]
        self._say(f"{arm}, seed {seed}: there already")

    def begin(self, arm: str, seed: int) -> None:
        pace = (time.perf_counter() - self.began) / self.planned if self.planned else 60.0
        self._say(f"{arm}, seed {seed}; ETA of all {timedelta(seconds=round(self.left * pace))}")

    def end(self, arm: str, seed: int, numbers: Numbers) -> None:
        self.done += 1
        self.planned += self.minutes[arm]
        self.left -= self.minutes[arm]
        self._say(f"{arm}, seed {seed}: " + "  ".join(f"{name} {value:.5g}" for name, value in numbers.items()))

    def _say(self, text: str) -> None:
        if self.console is not None:
            width = 20
            bar = "━" * (width * self.done // self.total) + "─" * (width - width * self.done // self.total)
            self.console.print(f"{self.slug} {bar} {self.done}/{self.total}  {text}", markup=False)
