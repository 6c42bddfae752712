"""Contestants in turns: the same weights, the same input, rounds that disturb all alike, beside the machine's own peak.

`speed` is the first contestant's time over another's, and `speed cpu` the same for processor time, which other programs
on the machine disturb less. `done` is the arithmetic that a contestant really carries out, in GFLOP an image, and
`of peak` its rate over a square matrix product's in the same type. `flips` is the share of codes that differ from the
first contestant's.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

SIDE = 4096  # of the matrices whose product is the peak


@dataclass(frozen=True)
class Racer:
    """`encode`: pixels (B, 3, H, W) to codes (B, N); `decode`: codes to pixels; both in `dtype`."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype


@torch.no_grad()
def race(racers: dict[str, Racer], pixels: Tensor, rounds: int) -> dict[str, Any]:
    """Let all run `rounds` times in turns; the best round of each counts. The first is what others are compared to."""
    load = os.getloadavg()[0]
    first = next(iter(racers))
    codes = racers[first].encode(pixels)
    done, wall, cpu, results = {}, {}, {}, {}
    peaks: dict[str, float] = {}
    for name, racer in racers.items():  # counting is the warm-up
        done[name] = {
            "encode": _gflop(racer.encode, pixels[:1].to(racer.dtype)),
            "decode": _gflop(racer.decode, codes[:1]),
        }
        wall[name], cpu[name] = {"encode": [], "decode": []}, {"encode": [], "decode": []}
    for _ in range(rounds):
        for name, racer in racers.items():
            kind = _kind(racer.dtype)
            peaks[kind] = max(peaks.get(kind, 0.0), peak(racer.dtype))
            outputs = []
            for stage, function, argument in (
                ("encode", racer.encode, pixels.to(racer.dtype)),
                ("decode", racer.decode, codes),
            ):
                start, used = time.perf_counter(), time.process_time()
                outputs.append(function(argument))
                wall[name][stage].append(time.perf_counter() - start)
                cpu[name][stage].append(time.process_time() - used)
            results[name] = outputs
    rows = []
    for name, racer in racers.items():
        best = {stage: min(times) for stage, times in wall[name].items()}
        base = {stage: min(times) for stage, times in wall[first].items()}
        total = sum(best.values())
        rate = len(pixels) / peaks[_kind(racer.dtype)]
        rows.append(
            {
                "name": name,
                "seconds": best,
                "seconds_of_rounds": wall[name],
                "cpu_seconds": {stage: min(times) for stage, times in cpu[name].items()},
                "speed": sum(base.values()) / total,
                "speed_of_stage": {stage: base[stage] / best[stage] for stage in best},
                "speed_cpu": sum(min(t) for t in cpu[first].values()) / sum(min(t) for t in cpu[name].values()),
                "gflop_per_image": done[name],
                "of_peak": rate * sum(done[name].values()) / total,
                "of_peak_of_stage": {stage: rate * done[name][stage] / best[stage] for stage in best},
                "flips": (results[name][0] != results[first][0]).float().mean().item(),
                "largest_pixel_difference": (results[name][1].float() - results[first][1]).abs().max().item(),
            }
        )
    return {
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "load_before": load,
        "torch": torch.__version__,
        "peak_gflops": peaks,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    peaks = result["peak_gflops"]
    lines = ["matrix product: " + ", ".join(f"{rate:.0f} GFLOP/s in {kind}" for kind, rate in peaks.items())]
    head = ("", "encode s", "decode s", "speed", "(enc, dec)", "cpu", "done", "of peak", "(enc, dec)", "flips")
    lines.append("{:<16} {:>8} {:>8} {:>7}  {:<13} {:>6} {:>6} {:>8}  {:<13} {:>7}".format(*head))
    for row in result["rows"]:
        stages, shares = row["speed_of_stage"], row["of_peak_of_stage"]
        lines.append(
            f"{row['name']:<16} {row['seconds']['encode']:8.2f} {row['seconds']['decode']:8.2f} {row['speed']:6.2f}x"
            f"  ({stages['encode']:.2f}, {stages['decode']:.2f})  {row['speed_cpu']:5.2f}x"
            f" {sum(row['gflop_per_image'].values()):6.0f} {row['of_peak']:8.2f}"
            f"  ({shares['encode']:.2f}, {shares['decode']:.2f})  {row['flips']:7.4f}"
        )
    return "\n".join(lines)


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a square matrix product, the best of a few."""
    a, b = torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, SIDE, dtype=dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best / 1e9


def machine() -> str:
    """The processor's name and whether it multiplies bf16 matrices itself."""
    facts = dict.fromkeys(("model name", "flags"), "")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in facts:
            facts[key.strip()] = value.strip()
    return f"{facts['model name']}, {'with' if 'amx_bf16' in facts['flags'] else 'without'} bf16 matrix units"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gflop(function: Callable[[Tensor], Tensor], argument: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        function(argument)
    return counter.get_total_flops() / len(argument) / 1e9
