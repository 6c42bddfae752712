"""Measure the leaderboard: every tokenizer that ships or that a tiny recipe trains, one after the other.

    python benchmarks/leaderboard.py --data DATA -o RUNS [--board cifar10] [--only NAME ..] [--lpips BACKBONE HEADS]
    python docs/make_leaderboard.py

DATA holds the data sets (`cifar10/train.parquet`, ..), RUNS keeps trainings and the classifier that distances are taken
in. Every entry runs in a process of its own and writes benchmarks/results/leaderboard/BOARD/NAME.json; what is there is
not run again, what failed is (or that of `--again`). One that fails or takes too long is a line on the page.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from vistok.evaluation.leaderboard import BOARDS, Entry, entries, failed
from vistok.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "leaderboard"


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--board", choices=tuple(BOARDS), action="append")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--lpips", nargs=2, metavar=("BACKBONE", "HEADS"))
    parser.add_argument("--limit", type=float, default=600, help="seconds after which an entry has failed")
    given = parser.parse_args()
    wanted: list[tuple[Entry, str]] = []
    for name in given.board or BOARDS:
        wanted += [pair for pair in entries(BOARDS[name]) if not given.only or pair[0].name in given.only]
    begun = time.monotonic()
    for place, (entry, unfit) in enumerate(wanted):
        target = RESULTS / f"{entry.key}.json"
        if target.exists() and not given.again and "error" not in json.loads(target.read_text(encoding="utf-8")):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"{time.monotonic() - begun:6.0f} s  {place + 1}/{len(wanted)}  {entry.key}", flush=True)
        if unfit:
            _fail(target, entry, unfit)
        else:
            _run(entry, target, given)


def _run(entry: Entry, target: Path, given: argparse.Namespace) -> None:
    spec = {"entry": asdict(entry), "data": str(given.data), "runs": str(given.output), "target": str(target)}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(spec | {"lpips": given.lpips}, file)
        file.flush()
        command = [sys.executable, "-m", "vistok.evaluation.leaderboard", file.name]
        target.unlink(missing_ok=True)
        try:
            done = subprocess.run(command, timeout=given.limit, check=False)
        except subprocess.TimeoutExpired:
            _fail(target, entry, f"took more than {given.limit:.0f} s")
            return
    if not target.exists():
        _fail(target, entry, f"the process ended with {done.returncode}")
    held = json.loads(target.read_text(encoding="utf-8"))
    if "error" in held:
        print(f"          failed: {held['error']}", flush=True)
    else:
        row = held["reconstruction"]["prefixes"][-1]
        print(f"          {row['bits_per_pixel']:.3f} bits/pixel, {row['psnr']:.2f} dB", flush=True)


def _fail(target: Path, entry: Entry, error: str) -> None:
    write_atomically(target, (json.dumps(failed(entry, error), indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
