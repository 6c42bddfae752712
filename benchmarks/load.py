"""Loading a model folder of about 600 MB: time against reading its file, and the memory that it takes.

    python benchmarks/load.py [--megabytes 600] [--rounds 5] [--out benchmarks/results/load.json]

`read` is `Path.read_bytes()` of the same file, in turns with `vistok.load`; both from the page cache, where reading is
fastest and the bar of 1.3 is hardest to meet. `extra memory` is the growth of the process's peak (VmHWM) over what it
held when everything was imported, less the weights themselves, in shares of the file, in a process of its own; for a
conversion the weights are the authors' file, mapped from disk. Random weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from race import machine

import vistok
from vistok.tokenizers.vqgan import TAMING_F16, VQGAN, key_table

BARS = {"time_ratio": 1.3, "extra_memory": 1.0}
PEAK = """
import sys, torch, vistok
from pathlib import Path
from vistok import checkpoints, hub, tokenizers
from vistok.tokenizers import vqgan
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
{job}
print(peak() - before)
"""


def build(megabytes: int) -> VQGAN:
    """Taming's f16 VQGAN, as wide as it takes to reach the size (288 MB at its own width of 128)."""
    width = 32 * round(4 * (megabytes / 288) ** 0.5)
    return VQGAN(replace(TAMING_F16, cnn=replace(TAMING_F16.cnn, width=width)))


def measure(job: str) -> int:
    """Growth of peak memory in bytes while `job` runs in a fresh process."""
    ran = subprocess.run([sys.executable, "-c", PEAK.format(job=job)], check=True, stdout=subprocess.PIPE, text=True)
    return int(ran.stdout)


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "load.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, authors = Path(place) / "model", Path(place) / "authors.pt"
        model = build(args.megabytes)
        model.save(folder)
        theirs = key_table(model.config).to_theirs(model.state_dict())
        torch.save({name: tensor.contiguous().clone() for name, tensor in theirs.items()}, authors)
        size = (folder / "model.safetensors").stat().st_size
        del model, theirs
        read, load = [], []
        for _ in range(args.rounds):
            start = time.perf_counter()
            (folder / "model.safetensors").read_bytes()
            read.append(time.perf_counter() - start)
            start = time.perf_counter()
            vistok.load(folder)
            load.append(time.perf_counter() - start)
        load_memory = measure(f"vistok.load({str(folder)!r})")
        job = f"checkpoints.convert_file(Path({str(authors)!r}), 'vqgan', Path({str(Path(place) / 'out')!r}))"
        convert_memory = measure(job)
    result = {
        "command": f"python benchmarks/load.py --megabytes {args.megabytes} --rounds {args.rounds}",
        "machine": machine(),
        "file_megabytes": size / 1e6,
        "read_seconds": min(read),
        "load_seconds": min(load),
        "time_ratio": min(load) / min(read),
        "load_extra_memory": load_memory / size - 1,
        "convert_extra_memory": convert_memory / size - 1,
        "bars": BARS,
    }
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
