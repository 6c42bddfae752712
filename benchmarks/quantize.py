"""VQ lookup and training step against vector-quantize-pytorch, side by side: time and peak memory.

    python benchmarks/quantize.py [--threads 2] [--rounds 2] [--dims 8 256] [--out benchmarks/results/quantize.json]

N = 65,536 latents of D = 8 and D = 256, K = 16,384 codes, float32. Three jobs: `lookup` (codes of the latents, no
gradient), `ema` (forward and backward with commitment loss and moving-average update) and `gradient` (forward and
backward with commitment and codebook losses). Equal options: Euclidean distance, one head, straight-through gradient,
no restart of dead codes, no k-means initialisation, decay 0.8.

The peer holds several N x K matrices. Every run may take a share of the memory that is free when it starts (`--share`);
where the peer does not fit at N, both are compared at the largest N / 2^i at which it does, which is printed, and ours
is measured at N as well.

Each library runs in processes of its own, turn by turn within a round. `wall` is the best time of all rounds, `cpu` the
least processor time, which other programs on the machine disturb less; memory is the peak of the whole process (VmHWM,
with Python, PyTorch and the inputs in it). Ratios are the peer's number over ours, so larger is better. `agree` is the
share of equal codes: the rest are near-ties, which rounding decides.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

N, K = 65536, 16384
JOBS = ("lookup", "ema", "gradient")
LIBRARIES = ("vistok", "vector-quantize-pytorch")
BARS = {"speed": 1.5, "memory": 2.0}


def measure(library: str, job: str, dim: int, count: int, threads: int, repeats: int) -> dict[str, Any]:
    """Time one job in this process; the first, unmeasured call warms up."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    z = torch.randn(1, count, dim)
    weight = torch.randn(1, count, dim)
    codebook = torch.randn(K, dim)
    module, run = (ours if library == "vistok" else peer)(job, dim, codebook)
    before = memory("VmRSS")
    wall, cpu, codes = [], [], None
    for _ in range(repeats + 1):
        reset(module, codebook)
        x = z if job == "lookup" else z.clone().requires_grad_()
        start, used = time.perf_counter(), time.process_time()
        vectors, codes, loss = run(x)
        if job != "lookup":
            ((vectors * weight).sum() + loss).backward()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    assert codes is not None
    peak = memory("VmHWM")
    return {
        "wall": min(wall[1:]),
        "cpu": min(cpu[1:]),
        "peak_mib": peak,
        "above_inputs_mib": peak - before,
        "codes": fingerprint(codes),
    }


def ours(job: str, dim: int, codebook: Any) -> tuple[Any, Any]:
    import torch

    from vistok.quantize import VectorQuantizer

    learning = "gradient" if job == "gradient" else "ema"
    module = VectorQuantizer(dim, K, learning=learning, commitment=1.0, codebook_weight=1.0, decay=0.8)
    module.train(job != "lookup")

    def run(x: torch.Tensor) -> tuple[Any, Any, Any]:
        if job == "lookup":
            return None, module.encode(x), None
        out = module(x)
        return out.vectors, out.codes, torch.stack(list(out.losses.values())).sum()

    return module, run


def peer(job: str, dim: int, codebook: Any) -> tuple[Any, Any]:
    import torch

    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError as error:
        raise SystemExit(
            "this benchmark compares with vector-quantize-pytorch: pip install vector-quantize-pytorch"
        ) from error

    # one mean square carries both gradients where the codebook learns: the commitment and the codebook term at once
    options: dict[str, Any] = {"ema_update": False, "learnable_codebook": True} if job == "gradient" else {}
    module = VectorQuantize(dim, codebook_size=K, decay=0.8, commitment_weight=1.0, rotation_trick=False, **options)
    module.train(job != "lookup")

    def run(x: torch.Tensor) -> tuple[Any, Any, Any]:
        if job == "lookup":
            with torch.no_grad():
                return None, module(x)[1], None
        return module(x)

    return module, run


def reset(module: Any, codebook: Any) -> None:
    """The same codebook before every call, so that every call has the same codes."""
    import torch

    with torch.no_grad():
        holder = getattr(module, "_codebook", module)
        for name in ("codebook", "sums", "embed", "embed_avg"):
            target = getattr(holder, name, None)
            if isinstance(target, torch.Tensor):
                target.copy_(codebook.view_as(target))
        module.zero_grad()


def fingerprint(codes: Any) -> list[int]:
    """Every 16th code, enough to count disagreements."""
    return codes.flatten()[::16].tolist()


def memory(field: str) -> float:
    """A field of this process's memory status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"{field} is not in /proc/self/status; peak memory needs Linux")


def spawn(library: str, job: str, dim: int, count: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """Run one job in a process of its own; None where it does not fit into its share of the free memory."""
    limit = int(available() * args.share)
    command = [sys.executable, __file__, "--one", library, job, str(dim), str(count), str(limit)]
    command += ["--threads", str(args.threads), "--repeats", str(args.repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        if "memory" in done.stderr.splitlines()[-1]:
            return None
        raise SystemExit(f"{library} {job} D={dim} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def available() -> int:
    """Bytes of memory that a new process can have without taking it from another."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("MemAvailable is not in /proc/meminfo; this benchmark needs Linux")


def compare(job: str, dim: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both libraries in turn, `rounds` times, at the largest N / 2^i at which the peer fits into memory."""
    count, refused = args.latents, []
    runs: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
    while len(runs[LIBRARIES[1]]) < args.rounds:
        theirs = spawn(LIBRARIES[1], job, dim, count, args)
        if theirs is None:
            refused.append({"n": count, "limit_gib": round(available() * args.share / 2**30, 1)})
            count //= 2
            runs = {library: [] for library in LIBRARIES}
            continue
        runs[LIBRARIES[1]].append(theirs)
        runs[LIBRARIES[0]].append(fitting(spawn(LIBRARIES[0], job, dim, count, args)))
    mine, theirs = summary(runs[LIBRARIES[0]]), summary(runs[LIBRARIES[1]])
    pairs = list(zip(*(found[0]["codes"] for found in runs.values()), strict=True))
    return {
        "job": job,
        "dim": dim,
        "n": count,
        "peer_did_not_fit": refused,
        "vistok": mine,
        "vector_quantize_pytorch": theirs,
        "speed": theirs["wall"] / mine["wall"],
        "speed_cpu": theirs["cpu"] / mine["cpu"],
        "memory": theirs["peak_mib"] / mine["peak_mib"],
        "memory_above_inputs": theirs["above_inputs_mib"] / max(mine["above_inputs_mib"], 1.0),
        "agree": sum(a == b for a, b in pairs) / len(pairs),
        "vistok_at_full_n": mine if count == N else summary([fitting(spawn(LIBRARIES[0], job, dim, N, args))]),
    }


def fitting(run: dict[str, Any] | None) -> dict[str, Any]:
    if run is None:
        raise SystemExit("vistok did not fit into memory: free some, or raise --share")
    return run


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "wall": min(run["wall"] for run in runs),
        "wall_of_rounds": [round(run["wall"], 3) for run in runs],
        "cpu": min(run["cpu"] for run in runs),
        "peak_mib": max(run["peak_mib"] for run in runs),
        "above_inputs_mib": max(run["above_inputs_mib"] for run in runs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["job        D      N   ours s   peer s   wall    cpu   ours MiB   peer MiB  memory  agree"]
    for row in rows:
        mine, theirs = row["vistok"], row["vector_quantize_pytorch"]
        lines.append(
            f"{row['job']:<8} {row['dim']:>3} {row['n']:>6} {mine['wall']:8.3f} {theirs['wall']:8.3f} "
            f"{row['speed']:5.1f}x {row['speed_cpu']:5.1f}x {mine['peak_mib']:10.0f} {theirs['peak_mib']:10.0f} "
            f"{row['memory']:6.1f}x {row['agree']:6.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="measured calls per process")
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 256])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantize.json")
    parser.add_argument("--latents", type=int, default=N)
    parser.add_argument("--share", type=float, default=0.5, help="of the free memory that one run may take")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        library, job, dim, count, limit = args.one
        resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
        print(json.dumps(measure(library, job, int(dim), int(count), args.threads, args.repeats)))
        return
    rows: list[dict[str, Any]] = []
    for job in args.jobs:
        for dim in args.dims:
            load = os.getloadavg()[0]
            rows.append(compare(job, dim, args) | {"load_before": round(load, 1)})
            print(table(rows[-1:]), flush=True)
            write(args, rows)
    met = all(row["speed"] >= BARS["speed"] and row["memory"] >= BARS["memory"] for row in rows)
    print("\n" + table(rows))
    print(f"bars (speed {BARS['speed']}x, memory {BARS['memory']}x) {'met' if met else 'MISSED'} -> {args.out}")


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The rows so far, so that a run that is cut short leaves what it measured."""
    result = {
        "command": "python benchmarks/quantize.py " + " ".join(sys.argv[1:]),
        "latents_asked": args.latents,
        "codebook_size": K,
        "threads": args.threads,
        "rounds": args.rounds,
        "repeats": args.repeats,
        "machine": machine(),
        "versions": versions(),
        "bars": BARS,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "vector-quantize-pytorch")}


if __name__ == "__main__":
    main()
