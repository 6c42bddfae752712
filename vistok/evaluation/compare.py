"""Tokenizers, and JPEG, WebP and AVIF at equal bytes, side by side on one's own pictures: a report, JSON and a table.

    names x pictures --a process for each tokenizer (`contestant`)--> rows, pictures, speed, memory, usage
    first tokenizer's bytes x codecs --------------------------------> rows, pictures
    all -> means per prefix, Pareto set within limits, worst pictures -> report.html, report.json, report.md

What is done stays in the folder beside the report (REPORT.parts), so that an interrupted comparison goes on, and a
tokenizer that fails is a line in the report.
"""

import base64
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

import vistok
from vistok.data.items import Source
from vistok.data.sources import open_source
from vistok.environment import environment
from vistok.errors import InputError, OutputError
from vistok.evaluation.charts import STYLE, Series, line_chart
from vistok.evaluation.codecs import Ladder, available
from vistok.evaluation.protocols import evaluation_crop
from vistok.files import write_atomically
from vistok.metrics.ms_ssim import SMALLEST, ms_ssim
from vistok.metrics.ssim import ssim

VERSION = 1
MEASURES = ("tokens", "bpp", "psnr", "ssim", "ms_ssim")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Limits:
    """What a tokenizer may need at most, to be in the Pareto set: MB of memory, milliseconds to encode and decode."""

    memory_mb: float | None = None
    milliseconds: float | None = None
    commercial: bool = False  # only weights with a permissive licence


def compare(
    models: Sequence[str | None],
    data: str,
    report: Path,
    *,
    size: int = 256,
    limit: int = 24,
    show: int = 8,
    codecs: Sequence[str] | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare `models` (names or folders; None is the one that ships) on centre crops of `data`, and write `report`.

    size: side of the crop, 0 for whole pictures. limit: pictures. show: how many of them, worst first, are in the
    report. codecs: all that this Pillow has by default. progress: called with what is measured, done and total.
    Returns what report.json holds. Raises InputError where nothing could be measured, OutputError where the report
    cannot be written.
    """
    if report.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{report}: the report is a page, name it with .html; JSON and Markdown are written beside it")
    names = list(dict.fromkeys(model or "strata" for model in models))
    source = open_source(data)
    total = min(limit, len(source))
    parts = report.with_suffix(".parts")
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        spec = {"model": name, "data": str(data), "size": size, "limit": total, "threads": threads}
        found[name] = _contestant(spec, parts, total, progress)
    good = {name: result for name, result in found.items() if "error" not in result}
    if not good:
        told = "; ".join(f"{name}: {result['error']}" for name, result in found.items())
        raise InputError(f"not one tokenizer could be measured: {told}")
    first = next(iter(good.values()))
    coded = _codecs(first, source, size, list(available() if codecs is None else codecs), parts, progress)
    result = _summary(found, coded, limits or Limits())
    result |= {"data": source.name, "size": size, "pictures": len(first["rows"]), "environment": environment()}
    shown = _shown(good, show)
    _write(report, result, found, coded, shown, source, size, parts)
    return result


# -- measuring ---------------------------------------------------------------------------------------------------------


def _contestant(spec: dict[str, Any], parts: Path, total: int, progress: Progress | None) -> dict[str, Any]:
    """The result of one tokenizer, from disk where it is there already."""
    known = json.dumps(spec | {"vistok": vistok.__version__}, sort_keys=True)
    folder = parts / hashlib.sha256(known.encode()).hexdigest()[:16]
    done = folder / "result.json"
    if done.exists():
        held = json.loads(done.read_text(encoding="utf-8"))
        if "error" not in held:
            return held | {"folder": str(folder)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write beside the report: {error}") from error
    write_atomically(folder / "spec.json", json.dumps(spec | {"folder": str(folder)}).encode())
    command = [sys.executable, "-m", "vistok.evaluation.contestant", str(folder / "spec.json")]
    with open(folder / "log.txt", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if progress is not None:
                    progress(spec["model"], _count(folder / "progress"), total)
        except BaseException:
            process.kill()
            raise
    if not done.exists():  # killed, out of memory: nothing was left to say why
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        return {"error": f"the process ended with {process.returncode} ({last})", "folder": str(folder)}
    if progress is not None:
        progress(spec["model"], total, total)
    return json.loads(done.read_text(encoding="utf-8")) | {"folder": str(folder)}


def _codecs(
    first: dict[str, Any], source: Source, size: int, codecs: list[str], parts: Path, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Every codec at the bytes of every prefix of the first tokenizer, its codes as packed in a file."""
    found = {}
    for codec in codecs:
        key = json.dumps([codec, first["weights"], size, [row["id"] for row in first["rows"]]])
        folder = parts / f"{codec}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        done = folder / "result.json"
        if not done.exists():
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            rows, spent = [], [0.0, 0.0]
            for number, row in enumerate(first["rows"]):
                pixels = _original(source, row["place"], size)
                ladder, prefixes = Ladder(pixels, codec), []
                for prefix in row["prefixes"]:
                    best = ladder.best(-(-prefix["bits"] // 8))
                    large = min(pixels.shape[2:]) >= SMALLEST
                    prefixes.append(
                        {
                            "tokens": None,
                            "bits": 8 * best.bytes,
                            "bpp": 8 * best.bytes / pixels[0, 0].numel(),
                            "psnr": min(best.psnr, 100.0),
                            "ssim": float(ssim(best.pixels, pixels)[0]),
                            "ms_ssim": float(ms_ssim(best.pixels, pixels)[0]) if large else None,
                            "fits": best.fits,
                        }
                    )
                spent = [spent[0] + best.encode_seconds, spent[1] + best.decode_seconds]
                Image.fromarray(best.pixels[0].permute(1, 2, 0).numpy()).save(folder / "pictures" / f"{number:04d}.png")
                rows.append({"id": row["id"], "place": row["place"], "prefixes": prefixes, "map": None})
                if progress is not None:
                    progress(codec, number + 1, len(first["rows"]))
            times = {"encode_ms": 1000 * spent[0] / len(rows), "decode_ms": 1000 * spent[1] / len(rows)}
            write_atomically(done, json.dumps({"name": codec, "rows": rows} | times).encode())
        found[codec] = json.loads(done.read_text(encoding="utf-8")) | {"folder": str(folder)}
    return found


def _original(source: Source, place: int, size: int) -> torch.Tensor:
    image = source[place].image
    cut = evaluation_crop(image, size) if size else np.asarray(image)
    return torch.from_numpy(cut.copy()).permute(2, 0, 1)[None]


def _count(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return 0


# -- summing up --------------------------------------------------------------------------------------------------------


def _summary(found: dict[str, dict[str, Any]], coded: dict[str, dict[str, Any]], limits: Limits) -> dict[str, Any]:
    rows, contestants, failed = [], [], {}
    for name, result in found.items():
        if "error" in result:
            failed[name] = result["error"]
            continue
        keys: tuple[str, ...] = (
            "weights",
            "parameters",
            "licence",
            "peak_mb",
            "encode_ms",
            "decode_ms",
            "images_per_second",
        )
        keys += ("megapixels_per_second", "tokens_per_second", "codebooks")
        contestants.append({"name": name} | {key: result[key] for key in keys})
        rows += [{"name": name, "codec": False} | mean for mean in _means(result)]
    for name, result in coded.items():
        contestants.append({"name": name, "encode_ms": result["encode_ms"], "decode_ms": result["decode_ms"]})
        rows += [{"name": name, "codec": True} | mean for mean in _means(result)]
    by_name = {one["name"]: one for one in contestants}
    for row in rows:
        row["within"] = not row["codec"] and _within(by_name[row["name"]], limits)
    for row in rows:
        row["pareto"] = row["within"] and not any(_better(other, row, by_name) for other in rows if other["within"])
    return {"version": VERSION, "rows": rows, "contestants": contestants, "failed": failed, "limits": limits.__dict__}


def _means(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over the pictures for every prefix that all of them have, shortest first."""
    count = min(len(row["prefixes"]) for row in result["rows"])
    found = []
    for place in range(count):
        column = [row["prefixes"][place] for row in result["rows"]]
        values = {key: [one[key] for one in column] for key in MEASURES}
        found.append({key: fmean(part) if None not in part else None for key, part in values.items()})
    return found


def _within(contestant: dict[str, Any], limits: Limits) -> bool:
    from vistok.catalogue import PERMISSIVE

    time_ms = contestant["encode_ms"] + contestant["decode_ms"]
    return (
        (limits.memory_mb is None or contestant["peak_mb"] <= limits.memory_mb)
        and (limits.milliseconds is None or time_ms <= limits.milliseconds)
        and (not limits.commercial or contestant["licence"] in PERMISSIVE)
    )


def _better(other: dict[str, Any], row: dict[str, Any], contestants: dict[str, Any]) -> bool:
    """Whether `other` is nowhere worse and somewhere better: tokens, bits, PSNR, SSIM, time."""

    def values(one: dict[str, Any]) -> tuple[float, ...]:
        spent = contestants[one["name"]]["encode_ms"] + contestants[one["name"]]["decode_ms"]
        # rows of one tokenizer share its time: it decides between tokenizers alone
        return one["tokens"], one["bpp"], -one["psnr"], -one["ssim"], spent

    a, b = values(other), values(row)
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def _shown(good: dict[str, dict[str, Any]], show: int) -> list[int]:
    """Places of the pictures that tokenizers rebuild worst, each measured against its own mean, worst first."""
    count = min(len(result["rows"]) for result in good.values())
    gaps = np.zeros(count)
    for result in good.values():
        values = np.array([row["prefixes"][-1]["psnr"] for row in result["rows"][:count]])
        gaps += values - values.mean()
    return np.argsort(gaps, kind="stable")[:show].tolist()


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(
    report: Path,
    result: dict[str, Any],
    found: dict[str, dict[str, Any]],
    coded: dict[str, dict[str, Any]],
    shown: list[int],
    source: Source,
    size: int,
    parts: Path,
) -> None:
    everyone = {name: one for name, one in (*found.items(), *coded.items()) if "error" not in one}
    first = next(iter(everyone.values()))
    pictures = []
    for place in shown:
        row = first["rows"][place]
        original = _original(source, row["place"], size)[0].permute(1, 2, 0).numpy()
        entries = []
        for name, one in everyone.items():
            path = Path(one["folder"]) / "pictures" / f"{place:04d}.png"
            numbers = one["rows"][place]["prefixes"][-1]
            with Image.open(path) as image:
                entry = {"name": name, "picture": _inline(np.asarray(image)), "map": one["rows"][place]["map"]}
            entries.append(entry | {key: numbers[key] for key in ("bpp", "psnr", "ssim")})
        pictures.append({"id": row["id"], "original": _inline(original), "rebuilt": entries})
    page = files("vistok.evaluation").joinpath("compare.html").read_text(encoding="utf-8")
    content = {
        "STYLE": STYLE,
        "TITLE": escape(f"{len(found)} tokenizers on {result['pictures']} pictures of {result['data']}"),
        "CHARTS": _charts(result),
        "DATA": json.dumps({**result, "shown": pictures}).replace("</", "<\\/"),
    }
    for key, value in content.items():
        page = page.replace(f"<!--{key}-->", value)
    write_atomically(report, page.encode())
    write_atomically(report.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(report.with_suffix(".md"), markdown(result).encode())


def _charts(result: dict[str, Any]) -> str:
    """Rate against each quality, and the sorted counts of every codebook."""
    found = []
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    for key, label in (("psnr", "PSNR, dB"), ("ssim", "SSIM"), ("ms_ssim", "MS-SSIM")):
        series = []
        for place, name in enumerate(names):
            rows = [row for row in result["rows"] if row["name"] == name and row[key] is not None and row["bpp"] > 0]
            points = sorted((row["bpp"], row[key]) for row in rows)
            series.append(Series(name, points, dashed=any(row["codec"] for row in rows), colour=place % 6))
        found.append(f"<figure>{line_chart(series, 'bits per pixel', label, log_x=True)}</figure>")
    for one in result["contestants"]:
        books = [book for book in one.get("codebooks", []) if book["curve"]]
        if books:
            several = len(books) > 1
            curves = [
                Series(
                    f"{book['segment']}" if several else one["name"], [tuple(p) for p in book["curve"]], markers=False
                )
                for book in books[:6]
            ]
            chart = line_chart(curves, f"codes of {one['name']}, most frequent first", "times used", log_x=True)
            found.append(f"<figure>{chart}</figure>")
    return "\n".join(found)


def markdown(result: dict[str, Any]) -> str:
    """The same numbers as a table."""
    lines = [
        f"{result['pictures']} pictures of {result['data']}, "
        + (f"centre crops of {result['size']} x {result['size']}" if result["size"] else "whole"),
        "",
        "| | tokens | bits/pixel | PSNR dB | SSIM | MS-SSIM | Pareto |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [
            row["name"],
            "" if row["tokens"] is None else f"{row['tokens']:.0f}",
            f"{row['bpp']:.4f}",
            f"{row['psnr']:.2f}",
            f"{row['ssim']:.4f}",
            "" if row["ms_ssim"] is None else f"{row['ms_ssim']:.4f}",
            "yes" if row["pareto"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| | parameters | encode ms | decode ms | peak MB | licence |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["contestants"]:
        cells = [one["name"], f"{one['parameters'] / 1e6:.1f} M" if "parameters" in one else ""]
        cells += [f"{one['encode_ms']:.1f}", f"{one['decode_ms']:.1f}"]
        cells += [f"{one['peak_mb']:.0f}" if "peak_mb" in one else "", one.get("licence") or ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [""] + [f"failed: {name}: {error}" for name, error in result["failed"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _inline(pixels: np.ndarray) -> str:
    """A picture as a data URL, lossless."""
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=50)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
