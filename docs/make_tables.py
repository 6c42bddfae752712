"""Fill the tables in the docs from the tree and from result files: `python docs/make_tables.py` (`--check`: only look).

A page marks a table with `<!-- name -->` and `<!-- /name -->`; what stands between is replaced. Nothing is typed in.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vistok.inventory import PACKAGE, holdings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SYSTEMS = sorted(f"docs/systems/{path.name}" for path in (ROOT / "docs" / "systems").glob("*.md"))
PAGES = ("README.md", "docs/benchmarks.md", "docs/generation.md", *SYSTEMS)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Markdown, numbers to the right."""
    rule = [":---" if index == 0 else "---:" for index in range(len(head))]
    lines = [head, rule, *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def systems() -> str:
    """What is here of every system."""
    rows = []
    for held in holdings():
        page = ROOT / "docs" / "systems" / f"{held.system}.md"
        name = f"[{held.system}](docs/systems/{page.name})" if page.exists() else held.system
        cells = ["yes" if held.code else "", "yes" if held.parity else "", held.weights or "", ", ".join(held.recipes)]
        papers = ", ".join(
            f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper.startswith("arXiv:") else paper
            for paper in held.paper.split(", ")
        )
        rows.append([name, ", ".join(held.roles), papers, *cells])
    return table(["system", "role", "paper", "code", "parity", "checkpoints", "recipes"], rows)


def result(name: str) -> dict[str, Any]:
    """A result file of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def strata() -> str:
    """The shipped tokenizer's curve, a row per prefix, with the codecs' PSNR at the same bytes."""
    rows = result("rate_distortion")["rows"]
    codecs = ["jpeg", "webp", "avif"]
    lines = []
    for ours in (row for row in rows if row["coder"] == "tokens"):
        there = {row["coder"]: row["psnr"] for row in rows if row["tokens"] == ours["tokens"]}
        file = ours.get("file_bpp")
        lines.append(
            [
                ours["tokens"],
                f"{ours['bpp']:.4f}",
                f"{file:.4f}" if file is not None else "",
                f"**{ours['psnr']:.2f}**",
                *(f"{there[codec]:.2f}" for codec in codecs),
                f"{ours['ssim']:.3f}",
            ]
        )
    names = ["JPEG", "WebP", "AVIF"]
    return table(["tokens", "bits/pixel", "compressed file", "PSNR dB", *names, "SSIM"], lines)


def rate_distortion() -> str:
    """The whole table as the benchmark wrote it."""
    return (RESULTS / "rate_distortion.md").read_text(encoding="utf-8").rstrip()


def race(name: str) -> str:
    """Speeds of a model beside a plain implementation, as `benchmarks/race.py` measured them."""
    lines = [
        [
            row["name"],
            f"{row['speed']:.2f}x",
            f"{row['speed_cpu']:.2f}x",
            f"{sum(row['gflop_per_image'].values()):.0f}",
            f"{row['of_peak']:.2f}",
            f"{row['flips']:.1%}",
        ]
        for row in result(name)["rows"]
    ]
    head = ["", "speed", "by processor time", "GFLOP an image", "of the matrix product's rate", "codes that differ"]
    return table(head, lines)


def generate() -> str:
    """Autoregressive generation beside the authors' style, as `benchmarks/generate.py` measured it."""
    found = result("generate")
    lines = [
        [
            row["name"],
            f"{row['milliseconds_a_step']:.0f}",
            f"{row['cpu_milliseconds_a_step']:.0f}",
            f"{row['speed_over_plain']:.2f}x",
            f"{row['speed_cpu_over_plain']:.2f}x",
            f"{row['of_floor']:.2f}",
            "" if row["name"].startswith("plain") else f"{found['codes_equal'][row['name'].split()[1]]:.1%}",
        ]
        for row in found["rows"]
    ]
    head = ["", "ms a step", "of processor time", "speed", "by processor time", "of the floor", "greedy codes equal"]
    told = f"`{found['command']}`, {found['environment']['device']}, a load of {found['load'][0]:.0f} to "
    return table(head, lines) + f"\n\n{told}{found['load'][1]:.0f} on two cores."


def reducers() -> str:
    """Choosing and merging tokens beside the formulas, as `benchmarks/reducers.py` measured them."""
    if not (RESULTS / "reducers.json").exists():
        return "Not run yet."
    found = result("reducers")
    lines = [
        [
            f"{row['job']}, {row['tokens']:,} tokens of {row['dim']:,}",
            row["pictures"],
            f"{row['kept']:,}",
            f"{row['formula_ms']:.2f}",
            f"{row['vistok_ms']:.2f}",
            f"{row['speed']:.2f}x",
            ("yes" if row["same_picks"] else "no")
            + "".join(f", order from step {one['step']} on, a tie of {one['gap']:.0e}" for one in _ties(row)),
        ]
        for row in found["rows"]
    ]
    head = ["", "pictures", "kept", "formula, ms a picture", "vistok, ms", "speed", "same picks"]
    grown = "; ".join(f"{row['job']} of {row['dim']:,}: {row['times']}x" for row in found["growth"])
    return table(head, lines) + f"\n\nFrom 576 to 2,880 tokens, where N squared is 25x: {grown}."


def _ties(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in row.get("first_differences", []) if one["gap"] is not None]


def reproduction(slug: str) -> str:
    """The result of `vistok reproduce SLUG`: verdict, numbers, rule, and what it ran on."""
    from vistok.evaluation.reproduction import cell, read_result

    path = PACKAGE / "reproductions" / f"{slug.replace('-', '_')}.json"
    if not path.exists():
        return f"Not run yet: `vistok reproduce {slug}`."
    found = read_result(path.read_text(encoding="utf-8"), path.name)
    rows = [
        [metric, *(cell(arm, metric, name == found["baseline"]) for name, arm in found["arms"].items())]
        for metric in found["report"]
    ]
    head = ["", *(name + (" (baseline)" if name == found["baseline"] else "") for name in found["arms"])]
    rule = [
        [
            clause["text"],
            clause["limits"],
            ", ".join("not finite" if value is None else f"{value:.4g}" for value in clause["values"]),
            "yes" if clause["holds"] else "no",
        ]
        for clause in found["rule"]
    ]
    seconds = sum(entry["processor_seconds"] for arm in found["arms"].values() for entry in arm.get("spent", []))
    machine = found["environment"]
    budget = "; ".join(f"{name}: {arm['what']}, {arm['steps']} steps" for name, arm in found["arms"].items())
    return "\n\n".join(
        [
            f"**{found['verdict'].capitalize()}**: {found['claim']} ({found['source']}).",
            f"Arms, in batches of {found['batch']}, {found['seeds']} seeds: {budget}.",
            table(head, rows),
            "Mean over seeds (lowest to highest), and the mean ratio to the baseline. The rule was written down before "
            "the run; each clause has to hold for every seed:",
            table(["", "limit", "seeds", "holds"], rule),
            f"Looked at: {found['checked']}.",
            f"`vistok reproduce {slug}`, {seconds / 60:.0f} minutes of one core ({machine['device']}, torch "
            f"{machine['torch']}).",
        ]
    )


def written(name: str) -> str:
    """A table as its benchmark wrote it, with the command that made it."""
    path = RESULTS / f"{name}.md"
    if not path.exists():
        return "Not run yet."
    found = result(name)
    told = f"`{found['command']}`, {found['machine']}, weights {found['weights'][:8]}."
    return path.read_text(encoding="utf-8").rstrip() + "\n\n" + told


REPRODUCTION = "reproduction-"
ELSEWHERE = ("generation",)  # parts of pages that a benchmark writes itself: benchmarks/generation.py --report
TABLES: dict[str, Callable[[], str]] = {
    "systems": systems,
    "strata": strata,
    "rate-distortion": rate_distortion,
    "vqgan": lambda: race("vqgan"),
    "titok": lambda: race("titok"),
    "reducers": reducers,
    "generate": generate,
    "files-kodak": lambda: written("files-kodak"),
    "files-crops": lambda: written("files-crops"),
    "files-crops-tiny": lambda: written("files-crops-tiny"),
    "progressive": lambda: written("progressive"),
}


def filled(text: str) -> str:
    """The page with every table that it marks made anew."""

    def replace(match: re.Match) -> str:
        name = match.group(1)
        if name in ELSEWHERE:
            return match.group(0)
        if name.startswith(REPRODUCTION):
            made = reproduction(name.removeprefix(REPRODUCTION))
        elif name in TABLES:
            made = TABLES[name]()
        else:
            raise SystemExit(f"no table {name!r}; there are {', '.join(TABLES)} and {REPRODUCTION}SLUG")
        return f"<!-- {name} -->\n{made}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\S+) -->\n.*?<!-- /\1 -->", replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    stale = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/make_tables.py")
    print(f"{len(stale)} pages changed")
