"""`vistok encode --engine ray` beside the local engine: the same pictures into the same store on one machine.

    python benchmarks/ray.py [--source ../shared/data/cifar10/train.parquet] [--items 10000] [--workers 1 2]

Ray's start, its workers' start (each imports torch and loads the model) and the shutdown are the price of a job, not
of an item, so two numbers are reported: the whole job, and `steady`, the items between the first batch that arrives
and the last, over that time. Rounds take turns; the best of each counts. `equal` says whether the stores' shards have
the same hashes. Writes benchmarks/results/ray.json.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).parent))  # or `import ray` finds this file

import torch

import vistok
from vistok.data.items import Source
from vistok.data.sources import open_source
from vistok.data.store import Manifest
from vistok.scale.encode import EncodeOptions, encode_source
from vistok.scale.ray_engine import RayEngine
from vistok.tokenizer import Tokenizer

RESULT = Path(__file__).parent / "results" / "ray.json"


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="../shared/data/cifar10/train.parquet")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    import ray

    source = open_source(given.source).first(given.items)
    tokenizer = vistok.load(device="cpu")
    engines: dict[str, RayEngine | None] = {"local": None}
    engines |= {
        f"ray, {count} worker{'s' * (count > 1)}": RayEngine(workers=count, gpus=False) for count in given.workers
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for _ in range(given.rounds):
        for name, engine in engines.items():
            runs[name].append(encoded(source, tokenizer, engine))
    rows = []
    for name, rounds in runs.items():
        whole, steady = (max(run[key] for run in rounds) for key in ("items_per_second", "steady_items_per_second"))
        rows.append({"engine": name, "items_per_second": whole, "steady_items_per_second": steady})
    for row in rows:
        row["ratio"] = row["items_per_second"] / rows[0]["items_per_second"]
        row["steady_ratio"] = row["steady_items_per_second"] / rows[0]["steady_items_per_second"]
    result = {
        "command": f"python benchmarks/ray.py --items {given.items} --workers {' '.join(map(str, given.workers))}",
        "model": tokenizer.name,
        "source": f"{source.name}, {len(source)} items",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads locally",
        "ray": ray.__version__,
        "rows": rows,
        "equal": len({run["shards"] for rounds in runs.values() for run in rounds}) == 1,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    print(json.dumps(result, indent=2))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def encoded(source: Source, tokenizer: Tokenizer, engine: RayEngine | None) -> dict[str, Any]:
    """One job: items per second of the whole, and between the first and the last batch; the shards' hashes."""
    arrived: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        encode_source(
            source,
            tokenizer,
            Path(folder) / "store",
            EncodeOptions(),
            lambda done, bad: arrived.append((time.perf_counter(), done)),
            engine=engine,
        )
        seconds = time.perf_counter() - start
        shards = " ".join(shard["sha256"] for shard in Manifest.read(Path(folder) / "store").shards)
    (first, had), (last, total) = arrived[1], arrived[-1]
    return {
        "items_per_second": len(source) / seconds,
        "steady_items_per_second": (total - had) / (last - first),
        "shards": shards,
    }


if __name__ == "__main__":
    main()
