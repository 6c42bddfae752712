"""`vistok doctor`: what is wrong with a run, and which recipe key mends it."""

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.terminal import emit_json, output


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, finished or running.")],
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Name what is wrong with a run: codebooks, dead losses, ranges, gradients, the learning rate; with the cure."""
    from vistok.training.chart import read_charts
    from vistok.training.doctor import examine

    findings = examine(run)
    if as_json:
        steps = max(int(chart.rows[-1]["step"]) for chart in read_charts(run) if chart.rows)
        emit_json({"run": run, "step": steps, "findings": [finding.plain() for finding in findings]})
        return
    for finding in findings:
        output().print(f"[bold]{finding.name}[/bold]" + (f" of {finding.subject}" if finding.subject else ""))
        output().print(f"  {finding.told}", markup=False)
        output().print(f"  cure: {finding.cure}", markup=False)
        if finding.override:
            output().print(f"  key:  {finding.override}", markup=False)
    if not findings:
        output().print("nothing wrong was found", markup=False)
