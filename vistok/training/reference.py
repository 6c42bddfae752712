"""Reference loss curves: how a recipe's loss fell here, with the band that other seeds stay in.

    runs of several seeds         --> `record`: vistok/recipes/<slug>/<name>.curve.json
    a run with the same settings  --> `Comparison`: within the band or outside, while it trains and at the end

A point of a curve is the mean loss over an interval of steps. The band around it is 3 + 6 / (seeds - 1) standard
deviations between seeds wide on each side, pooled over a point and its neighbours, and at least 1 % of the loss: so few
seeds tell their deviation badly, and a healthy run should leave the band once in a hundred runs or less. Losses of two
stages have nothing in common: neighbours are of the same stage, and an interval that two stages share is no point.
Settings that do not change what is learnt, such as the seed or how often a row is logged, may differ.
"""

import bisect
import csv
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vistok.environment import environment
from vistok.errors import InputError
from vistok.files import write_atomically
from vistok.training.recipe import FOLDER, Recipe, check

VERSION = 1
POINTS = 20
LEAST, NEIGHBOURS = 0.01, 2
IMMATERIAL = {
    "data": ("workers", "validation"),
    "train": (
        "seed", "threads", "channels_last", "tensorboard", "log_every", "checkpoint_every", "sample_every",
        "validate_every",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Mean loss over the interval of steps that ends at `step`, and the band around it."""

    step: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A reference: its points, `every` so many steps, and what it was recorded on."""

    recipe: str
    settings: str
    every: int
    points: tuple[Point, ...]
    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Curve":
        """The curve in a file."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(Point(*row) for row in plain["points"])
        return cls(plain["recipe"], plain["settings"], plain["every"], points, plain["data"])


def settings_fingerprint(recipe: Recipe) -> str:
    """Hash of all settings of a recipe that decide what it learns and are not the defaults, 32 hex digits."""
    plain = recipe.model_dump(mode="json", exclude_defaults=True)  # so that a key that is added later changes no hash
    for section, keys in IMMATERIAL.items():
        plain[section] = {key: value for key, value in plain[section].items() if key not in keys}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


def find_curve(recipe: Recipe) -> Curve | None:
    """The reference of a recipe with these settings, None where there is none."""
    settings = settings_fingerprint(recipe)
    curves = (Curve.read(path) for path in sorted(FOLDER.glob("*/*.curve.json")))
    return next((curve for curve in curves if curve.settings == settings), None)


class Comparison:
    """A run beside its reference. `add` takes its logged rows in order; `verdict` says how it did.

    `data`: what the run learns from, {"items", "fingerprint"}. On other data than the reference's there is no verdict.
    """

    def __init__(self, curve: Curve, data: Mapping[str, Any]) -> None:
        self.curve = curve
        self.same_data = data.get("fingerprint") == curve.data.get("fingerprint")
        self._means = _Intervals(curve.every)
        self._points = {point.step: point for point in curve.points}
        self.seen: list[tuple[Point, float]] = []

    @classmethod
    def of_run(cls, recipe: Recipe, data: Mapping[str, Any], log: Path | None = None) -> "Comparison | None":
        """For a run of `recipe`, None where there is no reference; rows of `log` (a log.csv), if any, are taken in."""
        curve = find_curve(recipe)
        if curve is None:
            return None
        comparison = cls(curve, data)
        if log is not None and log.exists():
            for step, loss in _losses(log):
                comparison.add(step, loss)
        return comparison

    def add(self, step: int, loss: float) -> str | None:
        """Take a logged row; what to say of it, where it ends an interval that leaves the band or is back in it."""
        mean = self._means.add(step, loss)
        point = self._points.get(step)
        if mean is None or point is None:
            return None
        before = not self.seen or _inside(*self.seen[-1])
        self.seen.append((point, mean))
        if not self.same_data or _inside(point, mean) == before:
            return None
        where = "again within" if not before else "above" if mean > point.high else "below"
        return f"step {step}: loss {mean:.4g} is {where} the reference's band, {point.low:.4g} to {point.high:.4g}"

    def verdict(self) -> str | None:
        """The run as far as it went; None before the first point."""
        if not self.seen:
            return None
        name = f"the reference curve of {self.curve.recipe}"
        point, loss = self.seen[-1]
        last = f"loss {loss:.4g} at step {point.step}, {point.loss:.4g} there"
        if not self.same_data:
            return f"{name} was recorded on other data ({self.curve.data.get('items')} pictures): {last}; no verdict"
        outside = [point.step for point, loss in self.seen if not _inside(point, loss)]
        if not outside:
            return f"within {name} at all {len(self.seen)} points ({last})"
        return f"outside {name} at {len(outside)} of {len(self.seen)} points, first at step {outside[0]} ({last})"


def record(name: str, runs: Sequence[Path], path: Path) -> Curve:
    """Write the curve of a recipe from finished runs of it that differ in nothing but the seed, or raise InputError."""
    recipes = [check(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")), str(run)) for run in runs]
    facts = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in runs]
    settings = {settings_fingerprint(recipe) for recipe in recipes}
    seeds = [recipe.train.seed for recipe in recipes]
    if len(settings) != 1 or len({fact["fingerprint"] for fact in facts}) != 1 or len(set(seeds)) < 2:
        raise InputError("a reference wants two or more runs of one recipe on the same data, with different seeds")
    total, log_every = recipes[0].total_steps, recipes[0].train.log_every
    every = max(1, round(total / POINTS / log_every)) * log_every
    series = [_points(_losses(run / "log.csv"), every) for run in runs]
    ends = list(itertools.accumulate(held.train.steps for _, held in recipes[0].resolved()))
    stages = {step: bisect.bisect_left(ends, step) for step in set.intersection(*(set(points) for points in series))}
    steps = sorted(step for step, stage in stages.items() if bisect.bisect_right(ends, step - every) == stage)
    if len(steps) < 2:
        raise InputError(f"runs of {total} steps that log every {log_every} leave no curve; log more often")
    means = [math.fsum(points[step] for points in series) / len(series) for step in steps]
    variances = [
        math.fsum((points[step] - mean) ** 2 for points in series) / (len(series) - 1)
        for step, mean in zip(steps, means, strict=True)
    ]
    deviations = 3 + 6 / (len(series) - 1)
    points = []
    for index, (step, mean) in enumerate(zip(steps, means, strict=True)):
        around = range(max(0, index - NEIGHBOURS), min(len(steps), index + NEIGHBOURS + 1))
        near = [variances[other] for other in around if stages[steps[other]] == stages[step]]
        half = max(LEAST * abs(mean), deviations * math.sqrt(math.fsum(near) / len(near)))
        points.append(Point(step, *(float(f"{value:.5g}") for value in (mean, mean - half, mean + half))))
    data = {"items": facts[0]["items"], "fingerprint": facts[0]["fingerprint"]}
    plain = {
        "version": VERSION,
        "recipe": name,
        "settings": settings.pop(),
        "seeds": seeds,
        "every": every,
        "data": data,
        "environment": environment(),
    }
    lines = ",\n".join(f"  {json.dumps([point.step, point.loss, point.low, point.high])}" for point in points)
    text = json.dumps(plain, indent=1)[:-2] + f',\n "points": [\n{lines}\n ]\n}}\n'
    write_atomically(path, text.encode())
    return Curve.read(path)


def _inside(point: Point, loss: float) -> bool:
    return point.low <= loss <= point.high


class _Intervals:
    """Means of logged losses over intervals of `every` steps; a row's loss is the mean since the row before."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._before, self._sum, self._steps = 0, 0.0, 0

    def add(self, step: int, loss: float) -> float | None:
        """The interval's mean, where `step` ends one that was seen whole."""
        count = step - self._before
        self._before = step
        self._sum, self._steps = self._sum + loss * count, self._steps + count
        if step % self.every:
            if self._steps > step % self.every:  # a row that reaches into the next interval spoils this one
                self._sum, self._steps = 0.0, -self.every
            return None
        whole, mean = self._steps == self.every, self._sum / max(1, self._steps)
        self._sum, self._steps = 0.0, 0
        return mean if whole else None


def _points(rows: Iterable[tuple[int, float]], every: int) -> dict[int, float]:
    intervals = _Intervals(every)
    means = ((step, intervals.add(step, loss)) for step, loss in rows)
    return {step: mean for step, mean in means if mean is not None}


def _losses(log: Path) -> list[tuple[int, float]]:
    with open(log, encoding="utf-8", newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row.get("loss")]
