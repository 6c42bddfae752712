"""What a run says while it runs: log.csv, validation.csv, TensorBoard curves, and a progress bar or plain lines."""

import csv
import io
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from vistok.errors import MissingExtraError
from vistok.files import write_atomically


class CsvLog:
    """One row per logged step, flushed as it is written; a new column rewrites the file with it."""

    def __init__(self, path: Path, upto: int | None = None) -> None:
        """Continue `path`, cut back to rows of steps <= `upto`, or begin it anew (None)."""
        self.path = path
        self.columns: list[str] = []
        rows = _whole_rows(path) if upto is not None and path.exists() else []
        kept = [row for row in rows if int(row["step"]) <= (upto or 0)]
        self.columns = list(kept[0]) if kept else []
        self._rewrite(kept)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; numbers are written so that they read back exactly."""
        plain = {key: repr(value) if isinstance(value, float) else str(value) for key, value in row.items()}
        if not self.columns:
            self.columns = list(plain)
            self._rewrite([])
        elif set(plain) - set(self.columns):
            rows = _whole_rows(self.path)
            self.columns += [key for key in plain if key not in self.columns]
            self._rewrite(rows)
        line = io.StringIO()
        csv.DictWriter(line, self.columns, restval="", lineterminator="\n").writerow(plain)
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(line.getvalue())

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if self.columns:
            writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue().encode())


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a log, without a last one that a kill cut short."""
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


class Curves:
    """TensorBoard event files in `folder`; a no-op where `enabled` is False."""

    def __init__(self, folder: Path, enabled: bool, from_step: int) -> None:
        self._writer: Any = None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingExtraError(
                    "TensorBoard curves need `pip install vistok[train]`; train.tensorboard=false goes without"
                ) from error
            self._writer = SummaryWriter(str(folder), purge_step=from_step or None)

    def scalars(self, prefix: str, row: dict[str, Any]) -> None:
        """Every number of a row under `prefix/`."""
        if self._writer is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{prefix}/{key}", value, row["step"])

    def image(self, name: str, pixels: Any, step: int) -> None:
        """A picture (3, H, W), uint8 or float in [0, 1]."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step)

    def close(self) -> None:
        """Flush what is still in memory."""
        if self._writer is not None:
            self._writer.close()


class Display:
    """A live bar on a terminal, a line per logged row elsewhere, nothing where `console` is None."""

    def __init__(self, console: Any, total: int, done: int) -> None:
        self.console, self.total = console, total
        self._bar: Any = None
        self._began, self._first = time.perf_counter(), done
        if console is not None and console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[told]}"),
                console=console,
                speed_estimate_period=120,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=done, told="")

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def row(self, row: dict[str, Any], terms: list[str]) -> None:
        """Show a logged row: loss, terms, images/s and, on plain lines, the time left."""
        if self.console is None:
            return
        shown = "  ".join(f"{key} {row[key]:.4g}" for key in ["loss", *(terms if len(terms) > 1 else [])])
        shown += f"  {row['images_per_second']:.3g} images/s"
        if self._bar is not None:
            self._bar.update(self._task, told=shown)
            return
        step = row["step"]
        left = (time.perf_counter() - self._began) / max(1, step - self._first) * (self.total - step)
        self.console.print(f"step {step}/{self.total}  {shown}  ETA {timedelta(seconds=round(left))}", markup=False)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.console is not None:
            self.console.print(text, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
