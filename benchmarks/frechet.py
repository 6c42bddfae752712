"""The Frechet distance beside scipy's sqrtm, the way that most tools take it.

    python benchmarks/frechet.py [--width 2048] [--rounds 3] [--out results/frechet.json]

Statistics of rectified random features, as many as twice their width (a covariance of full rank) and a quarter of it (a
singular one). `sqrtm` is |m - m'|^2 + tr(C + C' - 2 sqrtm(C C')), its real part. Both take the same two Gaussians; the
bars are a ratio of 5 and a relative difference of 1e-6 at full rank. On one thread, in turns; the best round counts.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from race import machine
from scipy.linalg import sqrtm

from vistok.metrics.frechet import frechet_distance
from vistok.metrics.moments import Gaussian, gaussian


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """The definition, with a root of the product."""
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    shift = float((a.mean - b.mean).square().sum())
    return shift + float(a.covariance.trace() + b.covariance.trace()) - 2 * float(np.trace(root.real))


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "frechet.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(given.width, given.width, generator=rng) / given.width**0.5
    rows = {}
    for name, count in (("full rank", 2 * given.width), ("singular", given.width // 4)):
        drawn = [torch.randn(count, given.width, generator=rng) @ mix for _ in range(2)]
        a, b = gaussian(drawn[0].relu()), gaussian((1.1 * drawn[1] + 0.1).relu())
        seconds: dict[str, list[float]] = {"vistok": [], "sqrtm": []}
        values = {}
        for _ in range(given.rounds):
            for way, measure in (("vistok", frechet_distance), ("sqrtm", by_sqrtm)):
                started = time.perf_counter()
                values[way] = measure(a, b)
                seconds[way].append(time.perf_counter() - started)
        best = {way: min(times) for way, times in seconds.items()}
        rows[name] = {
            "rows": count,
            "seconds": best,
            "ratio": best["sqrtm"] / best["vistok"],
            "relative_difference": abs(values["vistok"] - values["sqrtm"]) / abs(values["sqrtm"]),
        }
        print(f"{name}: {rows[name]}")
    command = f"python benchmarks/frechet.py --width {given.width} --rounds {given.rounds}"
    result = {"command": command, "width": given.width, "rows": rows, "machine": machine(), "torch": torch.__version__}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
