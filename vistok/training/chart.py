"""What the doctor reads: the rows of a run, stage by stage, and what it gives: findings.

RUN/vitals.csv, RUN/validation.csv, RUN/recipe.yaml -> one Chart per stage
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vistok.errors import ConfigError, FormatError
from vistok.training.recipe import STAGE_SECTIONS, Recipe, StageSection, check

MOST_ROWS = 256  # of a stage that the rules look at: with more, every second of the older half is left out


@dataclass(frozen=True)
class Finding:
    """One diagnosis.

    name      the disease, such as "codebook-collapse"
    subject   the part, term or quantizer that has it; "" for the run
    told      what is wrong, with its numbers and steps
    cure      what to do
    override  the recipe key that does it, as `vistok train` takes it; None where no key can
    evidence  the numbers that led here
    """

    name: str
    subject: str
    told: str
    cure: str
    override: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        key = f" ({self.override})" if self.override else ""
        return f"{self.name}: {self.told}. Cure: {self.cure}{key}"

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass
class Chart:
    """What is known of one stage of a run.

    recipe      the recipe that holds in the stage; `fresh`: it starts from random weights
    first       the step that the stage begins at
    rows        logged rows, ascending: {"step": .., "loss": .., "term/NAME": weighted term, ..}, see vitals.py
    validation  rows of validation.csv in the stage
    own         number and section of the stage, where the recipe lists stages
    """

    recipe: Recipe
    first: int = 0
    fresh: bool = True
    rows: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    own: tuple[int, StageSection] | None = None

    def key(self, override: str | None) -> str | None:
        """An override where it takes effect: inside the stage, where the stage sets that key itself."""
        if override is None or self.own is None:
            return override
        index, stage = self.own
        section, _, rest = override.partition(".")
        given = getattr(stage, section, None)
        sets = section in STAGE_SECTIONS or (isinstance(given, dict) and rest.partition("=")[0] in given)
        return f"stages.{index}.{override}" if given is not None and sets else override

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, and thin the older ones out when there are many."""
        self.rows.append({key: float(value) for key, value in row.items()})
        if len(self.rows) > MOST_ROWS:
            self.rows = self.rows[: -MOST_ROWS // 2 : 2] + self.rows[-MOST_ROWS // 2 :]

    def series(self, name: str) -> np.ndarray:
        """The column `name` over the rows that have it, float64 (n,)."""
        return np.array([row[name] for row in self.rows if name in row])

    def names(self, prefix: str) -> list[str]:
        """X of every column "prefix/X" of the latest row."""
        start = prefix + "/"
        return [key.removeprefix(start) for key in (self.rows[-1] if self.rows else ()) if key.startswith(start)]

    @property
    def steps(self) -> int:
        """Steps of the stage that are done."""
        return int(self.rows[-1]["step"]) - self.first if self.rows else 0

    def span(self, count: int) -> str:
        """The steps of the last `count` rows, in words."""
        rows = self.rows[-count:]
        first, last = int(rows[0]["step"]), int(rows[-1]["step"])
        return f"at step {last}" if first == last else f"at steps {first} to {last}"


def read_charts(run: Path) -> list[Chart]:
    """A chart for each stage of the run in a folder. Raises FormatError."""
    import yaml

    try:
        recipe = check(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")), "recipe.yaml")
    except (OSError, yaml.YAMLError, ConfigError, AttributeError) as error:
        raise FormatError(f"{run} is not a run's folder: it has no recipe.yaml that can be read ({error})") from error
    rows, validation = _rows(run / "vitals.csv"), _rows(run / "validation.csv")
    charts, first = [], 0
    for index, (stage, held) in enumerate(recipe.resolved()):
        last = first + held.train.steps
        chart = Chart(held, first, index == 0, own=(index, stage) if recipe.stages else None)
        for row in rows:
            if first < row["step"] <= last:
                chart.add(row)
        chart.validation = [row for row in validation if first < row["step"] <= last]
        charts.append(chart)
        first = last
    return charts


def _rows(path: Path) -> list[dict[str, float]]:
    """Rows of a log as numbers, without empty cells and without a last row that is still being written."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    try:
        return [{key: float(value) for key, value in row.items() if value} for row in whole]
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
