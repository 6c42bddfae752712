"""The doctor: what is wrong with a run, read off what it measured of itself.

    model, batch, gradients -> vitals.py -> RUN/vitals.csv -> Chart of a stage -> rules of diagnoses.py -> Findings

`Doctor` measures and is asked at every logged row while a run trains; `examine` reads a run's folder, finished or not.
Both see the same rows through the same rules.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vistok.errors import FormatError
from vistok.training.chart import Chart, Finding, read_charts
from vistok.training.diagnoses import RULES
from vistok.training.log import CsvLog, Curves, Display
from vistok.training.recipe import Recipe
from vistok.training.vitals import Vitals

JUDGED = ("discriminator_accuracy", "discriminator_loss", "logits_real", "logits_fake")  # endings of columns
logger = logging.getLogger(__name__)


def diagnose(chart: Chart) -> list[Finding]:
    """Everything that the rules find in a chart, the causes before what they bring about."""
    found = [finding for rule in RULES for finding in rule(chart)] if chart.rows else []
    return [replace(finding, override=chart.key(finding.override)) for finding in found]


def examine(run: str | Path) -> list[Finding]:
    """Findings in a run's folder, of its stages in order; a finding of several stages comes once, as seen last.

    Raises FormatError where the folder is no run, or one that has logged nothing yet.
    """
    charts = read_charts(Path(run))
    if not any(chart.rows for chart in charts):
        raise FormatError(f"{run} has logged nothing yet: a run is examined from its first row of vitals.csv on")
    found = {(each.name, each.subject): each for chart in charts for each in diagnose(chart)}
    return list(found.values())


class Doctor:
    """Measures a run while it trains, writes RUN/vitals.csv, and says once in a stage what it finds.

    `upto`: the step that the run goes on from, None for a fresh one. Where `main` is False it only takes its part in
    counting what all processes count together.
    """

    def __init__(
        self, run: Path, recipe: Recipe, curves: Curves, display: Display, upto: int | None, main: bool
    ) -> None:
        self._run, self._recipe, self._upto, self._main = run, recipe, upto, main
        self._curves, self._display = curves, display
        self._log = CsvLog(run / "vitals.csv", upto) if main else None
        self._told: set[tuple[str, str]] = set()
        self._vitals: Vitals | None = None
        self.chart = Chart(recipe)

    def begin(self, stage: int, first: int, model: nn.Module, others: Mapping[str, nn.Module] | None = None) -> None:
        """Turn to a stage whose first step is `first`, and to its model and further modules by name."""
        self.end()
        self._vitals = Vitals(model, others)
        section, held = self._recipe.resolved()[stage]
        self.chart = Chart(held, first, stage == 0, own=(stage, section) if self._recipe.stages else None)
        if self._upto is not None and self._main:
            past = read_charts(self._run)[stage]
            self.chart.rows, self.chart.validation = past.rows, past.validation
        self._told = {(finding.name, finding.subject) for finding in diagnose(self.chart)}

    def end(self) -> None:
        """Let go of the model."""
        if self._vitals is not None:
            self._vitals.close()
            self._vitals = None

    def expect(self, due: bool) -> None:
        """Before a step: whether its row will be logged, so that it is measured."""
        if self._vitals is not None:
            self._vitals.due = due

    def observe(self, batch: Mapping[str, Any], terms: Mapping[str, Tensor]) -> None:
        """After the backward pass of a step, before its gradients are clipped; `terms` carry their graph or not."""
        if self._vitals is not None:
            self._vitals.observe(batch, terms)

    def row(self, row: Mapping[str, Any], terms: list[str]) -> None:
        """At every logged row, on all processes; `row` is the main one's, with a column for each of `terms`."""
        assert self._vitals is not None
        measured = self._vitals.row()
        if self._log is None:
            return
        kept = {key: row[key] for key in ("step", "loss", "lr", "grad_norm") if key in row}
        extra = {key: value for key, value in row.items() if key.endswith(JUDGED)}
        whole = kept | extra | {f"term/{name}": row[name] for name in terms} | measured
        self._log.add(whole)
        self._curves.scalars("vitals", {"step": row["step"]} | measured)
        self.chart.add(whole)
        try:
            findings = diagnose(self.chart)
        except Exception:  # a rule that stumbles must not end a run of days
            logger.warning("the doctor could not judge step %s", row["step"], exc_info=True)
            return
        for finding in findings:
            if (finding.name, finding.subject) not in self._told:
                self._told.add((finding.name, finding.subject))
                self._display.note(f"warning: {finding}")

    def validated(self, row: Mapping[str, Any]) -> None:
        """Take a row of validation.csv; it counts from the next logged row on."""
        self.chart.validation.append({key: float(value) for key, value in row.items()})
