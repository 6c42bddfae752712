"""What do windows, files and long clips cost beside the bare model? A clip there and back, beside the same calls alone.

    python benchmarks/clips.py [-m omnitokenizer-clips] [--size 128] [--frames 64] [--long 256] [--rounds 5]

    bare      tokenize and detokenize of windows that lie in memory, one after the other
    windows   encode_windows and decode_windows of the same frames
    files     an .mp4 read, encoded, decoded and written as an .mp4 again, as `vistok encode` and `decode` do it

All run in turns in one process with one thread, on random weights; the best round of each counts. `ratio` is bare over
windows in time, its bar 0.9; `files_ratio` pays for H.264 as well. Peak memory is of processes of their own: a clip of
one window, the short one, the long one, and the long one as one tensor through `encode`. Writes
benchmarks/results/clips.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.data.sources import open_source
from vistok.data.video import write_clip
from vistok.scale.clips import decode_clip, encode_clip
from vistok.tokenizer import Tokenizer

RESULT = Path(__file__).parent / "results" / "clips.json"


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="omnitokenizer-clips")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--long", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=("files", "whole"), help="one run in this process; prints its peak in MB")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = vistok.create(given.model)
    assert isinstance(tokenizer, Tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        where = SimpleNamespace(source=Path(folder) / "clip.mp4", back=Path(folder) / "back.mp4")
        write_clip(where.source, moving(given.frames, given.size), rate=25)
        if given.peak:
            (whole if given.peak == "whole" else files)(tokenizer, where)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
            return
        seconds = timed(tokenizer, where, given.rounds)
    window = tokenizer.spec.window
    peaks = {
        "one_window": peak(given, window, "files"),
        "short": peak(given, given.frames, "files"),
        "long": peak(given, given.long, "files"),
        "long_whole": peak(given, given.long, "whole"),
    }
    result = {
        "command": f"python benchmarks/clips.py -m {given.model} --size {given.size} --frames {given.frames} "
        f"--long {given.long}",
        "model": f"{given.model}, random weights, windows of {window} frames of {given.size}x{given.size}",
        "machine": f"{platform.machine()}, 1 thread, cpu",
        "frames": given.frames,
        "long_frames": given.long,
        **{f"{name}_frames_per_second": given.frames / best for name, best in seconds.items()},
        "encode_ratio": seconds["bare_encode"] / seconds["windows_encode"],
        "decode_ratio": seconds["bare_decode"] / seconds["windows_decode"],
        "ratio": both(seconds, "bare") / both(seconds, "windows"),
        "bar": 0.9,
        "files_ratio": both(seconds, "bare") / both(seconds, "files"),
        "peak_mb": peaks,
        "long_over_short": peaks["long"] / peaks["short"],
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    print(json.dumps(result, indent=2))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def moving(frames: int, size: int) -> Iterator[Tensor]:
    """A smooth scene that moves on, uint8 (1, 3, 1, size, size) a frame."""
    rows, columns = torch.meshgrid(torch.linspace(0, 6, size), torch.linspace(0, 6, size), indexing="ij")
    for index in range(frames):
        phases = [torch.sin(rows + 0.1 * index + colour) * torch.cos(columns - 0.07 * index) for colour in range(3)]
        yield (torch.stack(phases) * 100 + 128).to(torch.uint8)[None, :, None]


def both(seconds: dict[str, float], name: str) -> float:
    """Encoding and decoding."""
    return seconds[f"{name}_encode"] + seconds[f"{name}_decode"]


def timed(tokenizer: Tokenizer, where: Any, rounds: int) -> dict[str, float]:
    """Best seconds of each, after one round that does not count."""
    item: Any = open_source(where.source)[0]
    window = tokenizer.spec.window
    parts = list(item.clip.windows(window))
    tokens = encode_clip(tokenizer, item)
    found: dict[str, float] = {}

    def bare_encode() -> None:
        with tokenizer.inference():
            for part in parts:
                padded = part[:, :, [min(t, part.shape[2] - 1) for t in range(window)]]
                tokenizer.tokenize(padded, tokenizer.spec.at(padded.shape[-2:], frames=window), seeds=[0])

    with tokenizer.inference():
        spec = tokenizer.spec.at(tuple(parts[0].shape[-2:]), frames=window)
        data = tokenizer.tokenize(parts[0], spec, seeds=[0])

    def bare_decode() -> None:
        with tokenizer.inference():
            for _ in parts:
                tokenizer.detokenize(data, spec, seeds=[0], dtype=torch.uint8)

    actions: dict[str, Callable[[], Any]] = {
        "bare_encode": bare_encode,
        "windows_encode": lambda: tokenizer.encode_windows(iter(parts), rate=25),
        "files_encode": lambda: encode_clip(tokenizer, item),
        "bare_decode": bare_decode,
        "windows_decode": lambda: [None for _ in tokenizer.decode_windows(tokens, dtype=torch.uint8)],
        "files_decode": lambda: decode_clip(tokenizer, tokens, where.back),
    }
    for turn in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            spent = time.perf_counter() - began
            if turn:
                found[name] = min(found.get(name, spent), spent)
    return found


def files(tokenizer: Tokenizer, where: Any) -> None:
    """There and back, a window at a time."""
    decode_clip(tokenizer, encode_clip(tokenizer, open_source(where.source)[0]), where.back)


def whole(tokenizer: Tokenizer, where: Any) -> None:
    """There and back with all frames in memory."""
    item: Any = open_source(where.source)[0]
    pixels = torch.from_numpy(item.frames()).permute(3, 0, 1, 2)[None]
    write_clip(where.back, [tokenizer.decode(tokenizer.encode(pixels), dtype=torch.uint8)], rate=25)


def peak(given: Any, frames: int, kind: str) -> int:
    """Peak memory, in MB, of a process that does it once."""
    words = ["-m", given.model, "--size", str(given.size), "--frames", str(frames), "--peak", kind]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
