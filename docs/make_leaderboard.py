"""Write docs/leaderboard.md from benchmarks/results/leaderboard: `python docs/make_leaderboard.py [--check]`."""

import sys
from pathlib import Path

from vistok.evaluation.leaderboard import page, read

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "leaderboard.md"

if __name__ == "__main__":
    made = page(read(ROOT / "benchmarks" / "results" / "leaderboard"))
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
            sys.exit("docs/leaderboard.md is out of date; run python docs/make_leaderboard.py")
    else:
        PAGE.write_text(made, encoding="utf-8")
