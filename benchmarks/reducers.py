"""Choosing and merging tokens: this library's batches against the published formulas, run picture by picture.

    python benchmarks/reducers.py            about a minute of one core; writes benchmarks/results/reducers.json

Both sides run in one process, in turns, on the same tokens (clusters with noise), in float32. Times are processor
time, the least of the rounds. The formulas are written as the papers and their code have them: DivPrune takes the
minimum over all that are chosen anew at every step; ToMe gathers, scatters and joins. Bar: at least 2x, with the same
picks: the same set, and in the same order but where two scores differ by less than float32 tells apart, which the
result file lists.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.reducers import divprune, tome

BAR = 2.0
RATIO = 0.098  # of the tokens, kept by DivPrune as published
CASES = {  # rule: (tokens, numbers each, pictures)
    "divprune": ((576, 1024, 8), (576, 4096, 8), (2880, 1024, 2), (2880, 4096, 2)),
    "tome": ((197, 768, 16), (576, 1024, 8), (2880, 1024, 4)),
}
HEAD = 64  # numbers of a key


def tokens_like(count: int, length: int, dim: int, seed: int = 0) -> Tensor:
    """(B, N, D) in a few dozen clusters of several sizes."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 40, dim, generator=rng)
    which = torch.randint(40, (count, length), generator=rng)
    noise = torch.randn(count, length, dim, generator=rng)
    return centres.gather(1, which[..., None].expand(-1, -1, dim)) + 0.7 * noise


def divprune_formula(tokens: Tensor, kept: int) -> Tensor:
    """One picture (N, D): the order of selection."""
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    apart = 1 - unit @ unit.T
    chosen: list[int] = []
    for step in range(kept):
        score = apart.topk(2, dim=0, largest=False).values[1] if not step else apart[chosen].min(0).values
        chosen.append(int(score.argmax()))
    return torch.tensor(chosen)


def tome_formula(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """One picture (1, N, C) with a class token: sources left, sources merged, and where to, as numbers of each half."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    scores[:, 0] = -math.inf
    best, nearest = scores.max(-1)
    order = best.argsort(-1, descending=True)
    return order[:, r:].sort(1).values, order[:, :r], nearest.gather(1, order[:, :r])


def merge_formula(x: Tensor, size: Tensor, left: Tensor, source: Tensor, into: Tensor) -> Tensor:
    """One picture (1, N, D) and sizes (1, N, 1), merged and averaged."""

    def summed(x: Tensor) -> Tensor:
        a, b, width = x[:, ::2], x[:, 1::2], x.shape[-1]
        rows = [index[..., None].expand(-1, -1, width) for index in (left, source, into)]
        return torch.cat([a.gather(1, rows[0]), b.scatter_reduce(1, rows[2], a.gather(1, rows[1]), "sum")], 1)

    return summed(x * size) / summed(size)


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Least processor time of each, in seconds, after one round that warms up."""
    least = dict.fromkeys(runs, math.inf)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            if turn:
                least[name] = min(least[name], time.process_time() - begun)
    return least


def measure_divprune(length: int, dim: int, count: int, rounds: int) -> list[dict[str, Any]]:
    tokens, kept = tokens_like(count, length, dim), round(RATIO * length)
    runs: dict[str, Callable[[], Any]] = {
        "formula": lambda: torch.stack([divprune_formula(one, kept) for one in tokens]),
        "vistok": lambda: divprune.select(tokens, kept),
    }
    theirs, ours = runs["formula"](), runs["vistok"]()
    found = row(
        "divprune: select",
        length,
        dim,
        count,
        kept,
        in_turns(runs, rounds),
        torch.equal(theirs.sort(1)[0], ours.sort(1)[0]),
    )
    return [found | {"first_differences": differences(tokens, theirs, ours)}]


def differences(tokens: Tensor, theirs: Tensor, ours: Tensor) -> list[dict[str, Any]]:
    """Where picks part, picture by picture: the step, and by how much the two scores differ in double precision."""
    found = []
    for item in (theirs != ours).any(1).nonzero()[:, 0].tolist():
        step = int((theirs[item] != ours[item]).nonzero()[0])
        unit = torch.nn.functional.normalize(tokens[item].double(), dim=-1)
        pair = torch.stack([theirs[item, step], ours[item, step]])
        apart = 1 - unit[pair] @ unit[theirs[item, :step]].T  # (2, step)
        gap = float(apart.amin(1).diff().abs()) if step else None
        found.append({"picture": item, "step": step, "gap": gap})
    return found


def measure_tome(length: int, dim: int, count: int, rounds: int) -> list[dict[str, Any]]:
    metric, x, r = tokens_like(count, length, HEAD), tokens_like(count, length, dim, 1), round(0.04 * length) or 1
    size = torch.randint(1, 4, (count, length, 1), generator=torch.Generator().manual_seed(2)).float()
    items = [slice(item, item + 1) for item in range(count)]

    def formula() -> Tensor:
        return torch.cat([merge_formula(x[i], size[i], *tome_formula(metric[i], r)) for i in items])

    def ours() -> Tensor:
        return tome.merge_weighted(x, tome.match(metric, r, protected=1), size[..., 0])[0]

    state = tome.match(metric, r, protected=1)
    theirs = [tome_formula(metric[i], r) for i in items]
    same = torch.equal(torch.cat([one[1] for one in theirs]) * 2, state.source)
    same = same and torch.equal(torch.cat([one[2] for one in theirs]) * 2 + 1, state.index.gather(1, state.into))
    same = same and bool(torch.allclose(formula(), ours(), atol=1e-5, rtol=1e-5))
    choosing: dict[str, Callable[[], Any]] = {
        "formula": lambda: [tome_formula(metric[i], r) for i in items],
        "vistok": lambda: tome.match(metric, r, protected=1),
    }
    whole: dict[str, Callable[[], Any]] = {"formula": formula, "vistok": ours}
    return [
        row("tome: match", length, HEAD, count, length - r, in_turns(choosing, rounds), same),
        row("tome: match and merge", length, dim, count, length - r, in_turns(whole, rounds), same),
    ]


def row(job: str, length: int, dim: int, count: int, kept: int, times: dict[str, float], same: bool) -> dict[str, Any]:
    found = {
        "job": job,
        "tokens": length,
        "dim": dim,
        "pictures": count,
        "kept": kept,
        "formula_ms": round(1000 * times["formula"] / count, 3),
        "vistok_ms": round(1000 * times["vistok"] / count, 3),
        "speed": round(times["formula"] / times["vistok"], 2),
        "same_picks": same,
    }
    print(
        f"{job:<22} N {length:>5}  D {dim:>5}  {count:>2} pictures  kept {kept:>5}  a picture: formula "
        f"{found['formula_ms']:8.2f} ms, vistok {found['vistok_ms']:8.2f} ms  {found['speed']:5.2f}x  same {same}",
        flush=True,
    )
    return found


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of 2,880 tokens over that of 576, a picture each; N squared would be 25."""
    found = []
    for job, dim in {(one["job"], one["dim"]) for one in rows}:
        by_length = {one["tokens"]: one["vistok_ms"] for one in rows if (one["job"], one["dim"]) == (job, dim)}
        if {576, 2880} <= by_length.keys():
            found.append({"job": job, "dim": dim, "times": round(by_length[2880] / by_length[576], 1), "squared": 25})
    return sorted(found, key=lambda one: (one["job"], one["dim"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only the smallest case of each, one round; no file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reducers.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for job, measure in (("tome", measure_tome), ("divprune", measure_divprune)):
            for case in CASES[job][:1] if args.quick else CASES[job]:
                rows += measure(*case, 1 if args.quick else args.rounds)
    if args.quick:
        return
    result = {
        "command": " ".join(["python benchmarks/reducers.py", *sys.argv[1:]]),
        "threads": args.threads,
        "rounds": args.rounds,
        "machine": machine(),
        "torch": torch.__version__,
        "bar": BAR,
        "rows": rows,
        "growth": growth(rows),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    bars = [one for one in rows if one["job"] != "tome: match"]
    met = all(one["speed"] >= BAR and one["same_picks"] for one in bars)
    print(f"bar ({BAR}x, same picks; matching alone is shown, not judged) {'met' if met else 'MISSED'} -> {args.out}")
    for one in result["growth"]:
        print(f"{one['job']}, D {one['dim']}: 576 to 2,880 tokens takes {one['times']}x (N squared: 25x)")


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
