"""Reproductions: a paper's claim at small scale, against the paper's own baseline, with a rule that comes first.

A reproduction is a file `vistok/reproductions/<slug>.py` that ends with `REPRODUCTION = Reproduction(...)`:

    claim, source      what the paper says, and where
    arms               name -> Arm: a function (seed, context) -> {metric: number}; one arm is the baseline
    steps, batch       the budget, the same for every arm
    rule               Conditions on the arms' numbers; the verdict is "shown" where each holds for every seed

    reproducing.reproduce: arms x seeds -> numbers -> `judged` -> result file -> `vistok systems`, the docs page

The rule is data, and lies in the run's folder before the first arm starts. Nothing here needs torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vistok.errors import ConfigError, FormatError, UnknownNameError, nearest
from vistok.inventory import PACKAGE

if TYPE_CHECKING:
    from pathlib import Path

    from vistok.data.items import Source
    from vistok.evaluation.reproducing import Context

VERSION = 1
SHOWN, NOT_SHOWN = "shown", "not shown"
Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    what     in words
    run      (seed, context) -> numbers; trains through `context.train`, which keeps to the budget
    minutes  what one seed takes, roughly, on one core
    steps    where equal budget means another number of steps, which `what` explains
    seeds    only the first so many seeds, where the rule needs no more of this arm
    """

    what: str
    run: "Callable[[int, Context], Numbers]"
    minutes: float
    steps: int | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Quantity:
    """A number made of the numbers of some arms, for one seed: see `of`, `ratio`, `difference`."""

    arms: tuple[str, ...]
    value: Callable[[Mapping[str, Numbers]], float]


def of(arm: str, metric: str) -> Quantity:
    """A metric of an arm."""
    return Quantity((arm,), lambda found: found[arm][metric])


def ratio(metric: str, arm: str, over: str) -> Quantity:
    """A metric of one arm over that of another; infinite over zero."""
    return Quantity((arm, over), lambda found: _over(found[arm][metric], found[over][metric]))


def difference(metric: str, arm: str, minus: str) -> Quantity:
    """A metric of one arm minus that of another."""
    return Quantity((arm, minus), lambda found: found[arm][metric] - found[minus][metric])


@dataclass(frozen=True)
class Condition:
    """One clause of a rule: a quantity within limits, for every seed in which its arms ran."""

    text: str
    quantity: Quantity
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def limits(self) -> str:
        """The limits in words."""
        below, above = f"at least {self.at_least:g}", f"at most {self.at_most:g}"
        if math.isinf(self.at_least):
            return above
        return below if math.isinf(self.at_most) else f"{below}, {above}"


@dataclass(frozen=True)
class Reproduction:
    """See the module's docstring.

    checked    what is looked at here, in which way it is less than the paper's experiment, what could mislead
    train, test  the data, as paths below the folder of data sets
    also       further paths there, that `sources` opens
    sources    where the halves are no files that `open_source` knows, or there are more than two: from the folder of
               data sets to sources by name, "train" and "test" among them
    memory     what it needs, in words
    report     metrics to show in the table, in this order; all of them are in the result file
    """

    slug: str
    title: str
    claim: str
    source: str
    checked: str
    baseline: str
    arms: Mapping[str, Arm]
    rule: tuple[Condition, ...]
    steps: int
    batch: int
    report: tuple[str, ...]
    train: str = "cifar10/train.parquet"
    test: str = "cifar10/test.parquet"
    also: tuple[str, ...] = ()
    sources: "Callable[[Path], Mapping[str, Source]] | None" = None
    seeds: int = 2
    memory: str = "1 GB"

    def __post_init__(self) -> None:
        wanted = {arm for condition in self.rule for arm in condition.quantity.arms} | {self.baseline}
        unknown = sorted(wanted - set(self.arms))
        if unknown:
            raise ConfigError(f"{self.slug}: the rule or the baseline names arms that are not there: {unknown}")
        if not self.rule or self.seeds < 2:
            raise ConfigError(f"{self.slug}: a reproduction has a rule, and at least two seeds")

    def steps_of(self, arm: str) -> int:
        """Training steps of an arm."""
        return self.arms[arm].steps or self.steps

    def runs(self, seeds: int) -> list[tuple[int, str]]:
        """(seed, arm), in the order in which they run."""
        return [(seed, name) for seed in range(seeds) for name, arm in self.arms.items() if seed < (arm.seeds or seeds)]

    def plan(self) -> dict[str, Any]:
        """All that decides the numbers and the verdict, as JSON values; written down before the first arm runs."""
        return {
            "reproduction": self.slug,
            "title": self.title,
            "claim": self.claim,
            "source": self.source,
            "checked": self.checked,
            "baseline": self.baseline,
            "batch": self.batch,
            "arms": {name: {"what": arm.what, "steps": self.steps_of(name)} for name, arm in self.arms.items()},
            "rule": [{"text": condition.text, "limits": condition.limits} for condition in self.rule],
            "report": list(self.report),
        }


def names() -> list[str]:
    """Slugs that have a reproduction, sorted."""
    folder = PACKAGE / "reproductions"
    return sorted(path.stem.replace("_", "-") for path in folder.glob("*.py") if not path.stem.startswith("_"))


def find(slug: str) -> Reproduction:
    """The reproduction of a system. Raises UnknownNameError that names the nearest ones."""
    if slug not in names():
        raise UnknownNameError(f"no reproduction of {slug!r}{nearest(slug, names()) or f'; there are: {names()}'}")
    found = getattr(import_module(f"vistok.reproductions.{slug.replace('-', '_')}"), "REPRODUCTION", None)
    if found is None:
        raise UnknownNameError(f"the reproduction of {slug!r} is no REPRODUCTION that `vistok reproduce` could run")
    return found


def judged(reproduction: Reproduction, numbers: Mapping[str, Mapping[int, Numbers]]) -> dict[str, Any]:
    """The verdict on numbers by arm and seed: {"verdict", "rule": [..], "arms": {..}}, as JSON values.

    A condition without a seed to look at does not hold, nor does one on a number that is not finite.
    """
    rule = []
    for condition in reproduction.rule:
        needed = condition.quantity.arms
        seeds = sorted(set.intersection(*(set(numbers.get(arm, {})) for arm in needed)))
        values = [condition.quantity.value({arm: numbers[arm][seed] for arm in needed}) for seed in seeds]
        holds = bool(values) and all(condition.at_least <= value <= condition.at_most for value in values)
        rule.append({"text": condition.text, "limits": condition.limits, "values": values, "holds": holds})
    baseline = numbers.get(reproduction.baseline, {})
    arms = {
        name: {
            "what": arm.what,
            "steps": reproduction.steps_of(name),
            "seeds": sorted(numbers.get(name, {})),
            "numbers": {metric: _spread(values) for metric, values in _by_metric(numbers.get(name, {})).items()},
            "ratios": {metric: _spread(values) for metric, values in _ratios(numbers.get(name, {}), baseline).items()},
        }
        for name, arm in reproduction.arms.items()
    }
    verdict = SHOWN if all(condition["holds"] for condition in rule) else NOT_SHOWN
    return {"verdict": verdict, "rule": rule, "arms": arms}


def read_result(text: str, where: str) -> dict[str, Any]:
    """A result file's content. Raises FormatError for another kind of file, or one of a newer version."""
    import json

    try:
        found = json.loads(text)
        version = found["version"]
        found["verdict"], found["rule"], found["arms"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where} is not the result of a reproduction ({error})") from error
    if version > VERSION:
        raise FormatError(f"{where} was written by a newer vistok; upgrade vistok")
    return found


def cell(arm: Mapping[str, Any], metric: str, baseline: bool) -> str:
    """One arm's metric in a table: mean, lowest and highest over seeds and, but for the baseline, the ratio to it."""
    found, over = arm["numbers"].get(metric), arm["ratios"].get(metric)
    if found is None:
        return ""
    values = [math.nan if found[key] is None else found[key] for key in ("mean", "low", "high")]
    told = f"{values[0]:.4g}" + (f" ({values[1]:.4g} to {values[2]:.4g})" if len(arm["seeds"]) > 1 else "")
    return told if baseline or over is None or over["mean"] is None else f"{told}, {over['mean']:.3g}x"


def _over(number: float, baseline: float) -> float:
    return number / baseline if baseline else math.inf


def _by_metric(runs: Mapping[int, Numbers]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for seed in sorted(runs):
        for metric, value in runs[seed].items():
            found.setdefault(metric, []).append(value)
    return found


def _ratios(runs: Mapping[int, Numbers], baseline: Mapping[int, Numbers]) -> dict[str, list[float]]:
    pairs = {
        seed: {
            metric: _over(value, baseline[seed][metric]) for metric, value in run.items() if metric in baseline[seed]
        }
        for seed, run in runs.items()
        if seed in baseline
    }
    return _by_metric(pairs)


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": math.fsum(values) / len(values), "low": min(values), "high": max(values), "of_seeds": values}
