"""Does `vistok encode` keep the model busy? A data set into a store, beside the bare model on pixels in memory.

    python benchmarks/encode.py [--source ../shared/data/cifar10/test.parquet] [--items 10000] [-m MODEL]

Bare: `tokenizer.encode` on batches that are already decoded, tokens thrown away. Both run in turns in one process, at
the same batch size and the same number of threads, and the best round of each counts. Writes
benchmarks/results/encode.json; the bar is a ratio of 0.9 in time. `cpu_ratio` compares processor seconds: what
decoding and writing cost besides the model, also on a machine that others keep busy (`load` says whether they do).
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import vistok
from vistok.catalogue import DEFAULT_MODEL
from vistok.data.items import Source
from vistok.data.sources import open_source
from vistok.scale.encode import EncodeOptions, encode_source
from vistok.tokenizer import Tokenizer

RESULT = Path(__file__).parent / "results" / "encode.json"


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="../shared/data/cifar10/train.parquet")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("-m", "--model")
    parser.add_argument("--fresh", action="store_true", help="random weights: speed does not depend on them")
    parser.add_argument("--batch-size", type=int, default=EncodeOptions.batch_size)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    source = open_source(given.source).first(given.items)
    name = given.model or DEFAULT_MODEL
    tokenizer = (vistok.create if given.fresh else vistok.load)(name, device=given.device)
    batches = decoded(source, given.batch_size)
    bare_seconds, store_seconds, bare_cpu, store_cpu = [], [], [], []
    bare(tokenizer, batches[:2])  # warm up
    for _ in range(given.rounds):
        start = time.process_time()
        bare_seconds.append(bare(tokenizer, batches))
        middle = time.process_time()
        store_seconds.append(stored(tokenizer, source, given.batch_size))
        bare_cpu.append(middle - start)
        store_cpu.append(time.process_time() - middle)
    result = {
        "command": f"python benchmarks/encode.py --items {given.items} -m {name} --batch-size {given.batch_size}",
        "model": name,
        "source": f"{source.name}, {len(source)} items",
        "batch_size": given.batch_size,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {given.device}",
        "bare_items_per_second": len(source) / min(bare_seconds),
        "store_items_per_second": len(source) / min(store_seconds),
        "ratio": min(bare_seconds) / min(store_seconds),
        "bar": 0.9,
        "cpu_ratio": min(bare_cpu) / min(store_cpu),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    print(json.dumps(result, indent=2))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def decoded(source: Source, batch_size: int) -> list[torch.Tensor]:
    """All pictures, uint8 (B, 3, H, W) a batch; they share one size."""
    pixels = [torch.from_numpy(np.array(item.image)).permute(2, 0, 1) for item in source]
    return [torch.stack(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]


def bare(tokenizer: Tokenizer, batches: list[torch.Tensor]) -> float:
    """Seconds to encode them and nothing else."""
    start = time.perf_counter()
    for pixels in batches:
        tokens = tokenizer.encode(pixels)
    tokens.to("cpu")
    return time.perf_counter() - start


def stored(tokenizer: Tokenizer, source: Source, batch_size: int) -> float:
    """Seconds from the compressed files to a finished store."""
    folder = tempfile.mkdtemp()
    try:
        start = time.perf_counter()
        encode_source(source, tokenizer, Path(folder) / "store", EncodeOptions(batch_size=batch_size))
        return time.perf_counter() - start
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
