"""One tokenizer of a comparison, measured in a process of its own: what fails or runs out of memory fails alone.

    python -m vistok.evaluation.contestant SPEC.json

    SPEC {model, data, size, limit, folder} -> folder/pictures/0000.png ..  reconstructions from all tokens
                                               folder/result.json           rows of every picture, codes, speed, memory
                                               folder/progress              how many pictures are done
    SPEC {model, fidelity, folder}          -> folder/result.json           how well words and faces survive

The process's peak of memory is the tokenizer's: the libraries and weights that it starts with are subtracted, and
readers of text, which take more than many a tokenizer, have a process of their own.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vistok
from vistok import catalogue
from vistok.data.sources import open_source
from vistok.environment import environment
from vistok.errors import InputError, UnknownNameError, VistokError
from vistok.evaluation.protocols import evaluation_crop
from vistok.evaluation.reconstruction import fitting, prefix_lengths
from vistok.files import write_atomically
from vistok.metrics.codes import CodeStatistics
from vistok.metrics.ms_ssim import SMALLEST, ms_ssim
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import ssim
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

CURVE = 200  # points of a sorted curve of code counts


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one contestant; see the module's docstring. Raises what loading and encoding raise."""
    folder = Path(spec["folder"])
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    model = _load(spec)
    before = _memory()
    rows: list[dict[str, Any]] = []
    statistics, spent = CodeStatistics(), {"encode": 0.0, "decode": 0.0}
    pixels_seen = tokens_seen = 0
    source = open_source(spec["data"])
    for place, item in enumerate(source):
        if len(rows) == spec["limit"]:
            break
        try:
            cut = evaluation_crop(item.image, spec["size"]) if spec["size"] else np.asarray(item.image)
        except VistokError:
            continue
        pixels = torch.from_numpy(cut.copy()).permute(2, 0, 1)[None]
        on_size = fitting(model.spec, (pixels.shape[2], pixels.shape[3]))
        if not rows:  # the first call pays for what later ones find ready
            model.decode(model.encode(pixels, on_size=on_size))
        started = time.perf_counter()
        tokens = model.encode(pixels, on_size=on_size)
        spent["encode"] += time.perf_counter() - started
        statistics.update(tokens)
        prefixes = []
        for length in prefix_lengths(model.spec.of(tokens.canvas[0])):
            shorter = tokens if length == tokens.length else tokens.prefix(length)
            started = time.perf_counter()
            rebuilt = model.decode(shorter, dtype=torch.uint8).cpu()
            if length == tokens.length:
                spent["decode"] += time.perf_counter() - started
            prefixes.append(_row(shorter, rebuilt, pixels))
        Image.fromarray(rebuilt[0].permute(1, 2, 0).numpy()).save(folder / "pictures" / f"{len(rows):04d}.png")
        rows.append({"id": item.id, "place": place, "prefixes": prefixes, "map": _map(tokens)})
        pixels_seen, tokens_seen = pixels_seen + pixels[0, 0].numel(), tokens_seen + tokens.length
        (folder / "progress").write_text(str(len(rows)))
    if not rows:
        raise InputError(f"not one picture of {source.name} can be read")
    both = spent["encode"] + spent["decode"]
    return {
        "name": model.name,
        "weights": model.fingerprint,
        "parameters": sum(part.numel() for part in model.parameters()),
        "licence": _licence(model.name),
        "rows": rows,
        "peak_mb": max(0.0, _memory() - before),
        "encode_ms": 1000 * spent["encode"] / len(rows),
        "decode_ms": 1000 * spent["decode"] / len(rows),
        "images_per_second": len(rows) / both,
        "megapixels_per_second": pixels_seen / 1e6 / both,
        "tokens_per_second": tokens_seen / both,
        "codebooks": _codebooks(statistics) if model.spec.segments[0].codebooks else [],
        "environment": environment(),
    }


def fidelity(spec: dict[str, Any]) -> dict[str, Any]:
    """Text and faces of one contestant (`vistok.evaluation.fidelity`). Raises what loading and measuring raise."""
    from vistok.evaluation.fidelity import Fidelity, measure_fidelity

    told = Path(spec["folder"]) / "progress"

    def progress(done: int, total: int) -> None:
        told.write_text(str(done))

    return measure_fidelity(_load(spec), Fidelity(**spec["fidelity"]), progress)


def _load(spec: dict[str, Any]) -> Tokenizer:
    model = vistok.load(spec["model"])
    if not isinstance(model, Tokenizer):
        raise InputError(f"{model.name} is a {model.role}; tokenizers are compared")
    return model


def _row(tokens: Tokens, rebuilt: torch.Tensor, pixels: torch.Tensor) -> dict[str, Any]:
    large = min(pixels.shape[2:]) >= SMALLEST
    return {
        "tokens": tokens.length,
        "bits": int(tokens.bits()[0]),
        "bpp": float(tokens.bits()[0]) / pixels[0, 0].numel(),
        "psnr": min(float(psnr(rebuilt, pixels)[0]), 100.0),
        "ssim": float(ssim(rebuilt, pixels)[0]),
        "ms_ssim": float(ms_ssim(rebuilt, pixels)[0]) if large else None,
    }


def _map(tokens: Tokens) -> dict[str, Any] | None:
    """The codes of the finest grid of positions, to be drawn over the picture; None where tokens have no place."""
    if tokens.codes is None or tokens.canvas[0].pieces > 1:
        return None
    best: dict[str, Any] | None = None
    start = 0
    for segment in tokens.segments:
        if len(segment.shape) == 2 and (best is None or segment.count >= best["rows"] * best["columns"]):
            codes = tokens.codes[0, start : start + segment.count]
            codes = codes if codes.ndim == 1 else codes[:, 0]
            best = {
                "segment": segment.name,
                "rows": segment.shape[0],
                "columns": segment.shape[1],
                "codes": codes.tolist(),
            }
        start += segment.count
    return best


def _codebooks(statistics: CodeStatistics) -> list[dict[str, Any]]:
    """Usage of every codebook, and its counts sorted, thinned to a curve."""
    found = []
    for row, counts in zip(statistics.rows(), statistics.counts(), strict=True):
        ordered = counts.sort(descending=True).values
        places = torch.linspace(0, len(ordered) - 1, min(CURVE, len(ordered))).round().long().unique()
        curve = [[int(place) + 1, int(ordered[place])] for place in places if int(ordered[place])]
        found.append(
            {
                "segment": row.segment,
                "column": row.column,
                "size": row.size,
                "usage": row.usage,
                "perplexity": row.perplexity,
                "counted": row.counted,
                "curve": curve,
            }
        )
    return found


def _licence(name: str) -> str | None:
    try:
        return catalogue.find(name).licences.weights
    except (UnknownNameError, AttributeError):
        return None


def _memory() -> float:
    """Peak of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main(path: str) -> int:
    """Measure what a spec file says; the result or the error is written beside it."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(spec.get("threads") or torch.get_num_threads())
    target = Path(spec["folder"]) / "result.json"
    try:
        found = (fidelity if "fidelity" in spec else measure)(spec)
    except Exception as error:  # whatever it is, it is this contestant's result
        write_atomically(target, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return 1
    write_atomically(target, json.dumps(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
