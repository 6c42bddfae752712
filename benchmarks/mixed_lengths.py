"""Batches of mixed lengths against the same tokens sorted by length, for tokenizers whose pictures need different ones.

    python benchmarks/mixed_lengths.py [--items 32] [--batch 8] [--rounds 5] [--out results/mixed_lengths.json]

The same tokens are decoded three times a round, in turns: in batches as they come (`mixed`), in batches sorted by
length (`sorted`), and as if every item had all positions (`padded`: KARL's mask over all 256, FlexTok's 256 registers).
`ratio` is mixed over sorted, the best round of each, and its bar is 1.1. `cpu` is the same by processor time, which
other programs disturb less. Networks are of half the published width and a few blocks, with random weights, on 256 grid
cells and lengths uniform in 1..256; pictures come from the transformers alone, so that no CNN dilutes the comparison.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from race import machine

from vistok.nn.query_vit import ViTSize
from vistok.tokenizers._flextok_network import TrunkSize
from vistok.tokenizers.flextok import VARIANTS as FLEXTOK
from vistok.tokenizers.flextok import FlexTok
from vistok.tokenizers.karl import KARL, KARLConfig
from vistok.tokens import Tokens

BAR = 1.1
Decode = Callable[[Tokens], Any]


def karl(blocks: int) -> KARL:
    """KARL on pixels: 256 cells, up to 256 codes."""
    size = ViTSize(512, blocks, 8)
    return KARL(KARLConfig(ViTSize(64, 1, 1), size, base="pixels", image_size=256)).eval()


def flextok(blocks: int) -> FlexTok:
    """FlexTok on pixels: 256 patches, 256 registers."""
    config = replace(
        FLEXTOK["flextok-tiny"], encoder=TrunkSize(64, 1), decoder=TrunkSize(512, blocks), registers=256,
        levels=(8, 8, 8, 5, 5, 5), size=(64, 64), grid=(16, 16),
    )  # fmt: skip
    return FlexTok(config).eval()


def contestants(blocks: int, items: int, rng: torch.Generator) -> dict[str, tuple[Tokens, Decode]]:
    """Tokens of mixed lengths, and what decodes them, by name."""
    lengths = torch.randint(1, 257, (items,), generator=rng)
    first, second = karl(blocks), flextok(blocks)
    scores = torch.rand(items, 256, generator=rng).argsort(1).argsort(1)
    kept = Tokens(
        first.spec.segments,
        torch.randint(first.config.codebook_size, (items, 256), generator=rng),
        keep=scores < lengths[:, None],
    )
    ordered = Tokens(second.spec.segments, torch.randint(64000, (items, 256), generator=rng))
    return {
        "karl": (kept, first.decode),
        "flextok, 2 steps": (ordered.prefix(lengths), lambda tokens: second.decode(tokens, steps=2, guidance=1.0)),
        "flextok, 2 steps with guidance": (
            ordered.prefix(lengths),
            lambda tokens: second.decode(tokens, steps=2, guidance=7.5),
        ),
    }


def race(tokens: Tokens, decode: Decode, batch: int, rounds: int) -> dict[str, Any]:
    """Times of the three orders, in turns."""
    orders = {
        "mixed": tokens,
        "sorted": tokens[tokens.lengths.argsort()],
        "padded": replace(tokens, keep=torch.ones_like(tokens.keep)),  # type: ignore[arg-type]
    }
    wall: dict[str, list[float]] = {name: [] for name in orders}
    cpu: dict[str, list[float]] = {name: [] for name in orders}
    for round_ in range(rounds + 1):
        for name, whole in orders.items():
            start, used = time.perf_counter(), time.process_time()
            for row in range(0, len(whole), batch):
                decode(whole[row : row + batch])
            if round_:  # the first warms up
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
    best = {name: min(times) for name, times in wall.items()}
    best_cpu = {name: min(times) for name, times in cpu.items()}
    return {
        "seconds": best,
        "seconds_of_rounds": wall,
        "ratio": best["mixed"] / best["sorted"],
        "ratio_cpu": best_cpu["mixed"] / best_cpu["sorted"],
        "padded_over_mixed": best["padded"] / best["mixed"],
        "padded_over_mixed_cpu": best_cpu["padded"] / best_cpu["mixed"],
    }


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mixed_lengths.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    load, rng = os.getloadavg()[0], torch.Generator().manual_seed(0)
    rows = {}
    for name, (tokens, decode) in contestants(args.blocks, args.items, rng).items():
        rows[name] = race(tokens, decode, args.batch, args.rounds)
        row = rows[name]
        print(
            f"{name:<32} mixed / sorted {row['ratio']:.3f} (cpu {row['ratio_cpu']:.3f}, bar {BAR})   "
            f"padded / mixed {row['padded_over_mixed']:.2f} (cpu {row['padded_over_mixed_cpu']:.2f})",
            flush=True,
        )
    result = {
        "command": f"python benchmarks/mixed_lengths.py --items {args.items} --batch {args.batch} "
        f"--blocks {args.blocks} --rounds {args.rounds} --threads {args.threads}",
        "machine": machine(),
        "load_before": load,
        "torch": torch.__version__,
        "bar": BAR,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
