"""Tokenizers, and JPEG, WebP and AVIF at equal bytes, side by side on one's own pictures: a report, JSON and a table.

    names x pictures --a process for each tokenizer (`contestant`)--> rows, pictures, speed, memory, usage
    names x words and faces, where they are asked for (`fidelity`) --> how much of them survives, at every prefix
    first tokenizer's bytes x codecs --------------------------------> rows, pictures
    all -> means per prefix, Pareto set within limits, worst pictures -> report.html, report.json, report.md

What is done stays in the folder beside the report (REPORT.parts), so that an interrupted comparison goes on, and a
tokenizer that fails is a line in the report.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

import vistok
from vistok.data.items import Source
from vistok.data.sources import open_source
from vistok.environment import environment
from vistok.errors import InputError, OutputError
from vistok.evaluation.codecs import Ladder, available
from vistok.evaluation.fidelity import MEASURES as FIDELITY
from vistok.evaluation.fidelity import Fidelity, jobs, prepared
from vistok.evaluation.report import original, write_report
from vistok.files import write_atomically
from vistok.metrics.ms_ssim import SMALLEST, ms_ssim
from vistok.metrics.ssim import ssim

VERSION = 1
MEASURES = ("tokens", "bpp", "psnr", "ssim", "ms_ssim")
# what the Pareto set is over, and whether more of it is better; of text and faces where every row has them
PARETO = {
    "tokens": False,
    "bpp": False,
    "psnr": True,
    "ssim": True,
    "ms": False,
    "t_ned": True,
    "f_sim": True,
    "free": True,  # 1 where the weights' licence allows commercial use, 0 where it does not or is not known
}
NAMES = {
    "bpp": "bits",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "ms": "time",
    "t_ned": "text",
    "f_sim": "faces",
    "free": "licence",
}
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
    fidelity: Fidelity | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare `models` (names or folders; None is the one that ships) on centre crops of `data`, and write `report`.

    size: side of the crop, 0 for whole pictures. limit: pictures. show: how many of them, worst first, are in the
    report. codecs: all that this Pillow has by default. fidelity: text and faces too, which takes a reader and an
    embedder of faces; what is not there is a note. progress: called with what is measured, done and total.
    Returns what report.json holds. Raises InputError where nothing could be measured, OutputError where the report
    cannot be written.
    """
    if report.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{report}: the report is a page, name it with .html; JSON and Markdown are written beside it")
    names = list(dict.fromkeys(model or "strata" for model in models))
    source = open_source(data)
    total = min(limit, len(source))
    parts = report.with_suffix(".parts")
    asked, notes = prepared(fidelity or Fidelity(), parts / "words")
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        spec = {"model": name, "data": str(data), "size": size, "limit": total, "threads": threads}
        found[name] = _contestant(spec, parts, total, progress)
    good = {name: result for name, result in found.items() if "error" not in result}
    if not good:
        told = "; ".join(f"{name}: {result['error']}" for name, result in found.items())
        raise InputError(f"not one tokenizer could be measured: {told}")
    first = next(iter(good.values()))
    if asked:
        for name in good:
            notes += _fidelity(name, asked, good[name], parts, threads, progress)
    coded = _codecs(first, source, size, list(available() if codecs is None else codecs), parts, progress)
    result = _summary(found, coded, limits or Limits())
    result |= {"data": source.name, "size": size, "pictures": len(first["rows"]), "environment": environment()}
    result |= {"notes": notes, "fidelity": _told(asked, good)}
    shown = _shown(good, show)
    write_report(report, result, found, coded, shown, source, size)
    return result


# -- measuring ---------------------------------------------------------------------------------------------------------


def _contestant(
    spec: dict[str, Any], parts: Path, total: int, progress: Progress | None, label: str = ""
) -> dict[str, Any]:
    """The result of one tokenizer, from disk where it is there already."""
    label = label or spec["model"]
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
                    progress(label, _count(folder / "progress"), total)
        except BaseException:
            process.kill()
            raise
    if not done.exists():  # killed, out of memory: nothing was left to say why
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        return {"error": f"the process ended with {process.returncode} ({last})", "folder": str(folder)}
    if progress is not None:
        progress(label, total, total)
    return json.loads(done.read_text(encoding="utf-8")) | {"folder": str(folder)}


def _fidelity(
    name: str, asked: Fidelity, result: dict[str, Any], parts: Path, threads: int | None, progress: Progress | None
) -> list[str]:
    """Put text and faces into a tokenizer's rows of means, `result["fidelity"]`; a note where that fails."""
    spec = {"model": name, "weights": result["weights"], "fidelity": asked.plain(), "threads": threads}
    found = _contestant(spec, parts, len(jobs(asked)), progress, f"{name}: text and faces")
    if "error" in found:
        return [f"text and faces of {name} are not measured: {found['error']}"]
    result["fidelity"] = found
    return []


def _told(asked: Fidelity, good: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was read, by whom, and how many words and faces there were. Empty where nothing was."""
    counts = [result["fidelity"] for result in good.values() if "fidelity" in result]
    if not counts:
        return {}
    words, faces = (max(one[key] for one in counts) for key in ("words", "faces"))
    told: dict[str, Any] = {"setting": asked.setting}
    if words:
        told |= {"words": words, "reader": asked.reader, "text": Path(str(asked.text)).name}
    if faces:
        told |= {"faces": faces, "embedder": asked.embedder, "pictures": Path(str(asked.faces)).name}
    return told


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
                pixels = original(source, row["place"], size)
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
    over = _pareto(rows, by_name)
    told: dict[str, Any] = {"version": VERSION, "rows": rows, "contestants": contestants, "failed": failed}
    return told | {"limits": limits.__dict__, "pareto_over": [NAMES.get(key, key) for key in over]}


def _means(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over the pictures for every prefix that all of them have, shortest first."""
    count = min(len(row["prefixes"]) for row in result["rows"])
    found = []
    for place in range(count):
        column = [row["prefixes"][place] for row in result["rows"]]
        values = {key: [one[key] for one in column] for key in MEASURES}
        found.append({key: fmean(part) if None not in part else None for key, part in values.items()})
    known = result.get("fidelity", {}).get("prefixes", [])
    for place, row in enumerate(found):  # from all tokens down: other pictures may have other prefixes
        back = len(found) - place
        row |= known[-back] if back <= len(known) else dict.fromkeys(FIDELITY)
    return found


def _free(contestant: dict[str, Any]) -> bool:
    from vistok.catalogue import PERMISSIVE

    return contestant.get("licence") in PERMISSIVE


def _within(contestant: dict[str, Any], limits: Limits) -> bool:
    time_ms = contestant["encode_ms"] + contestant["decode_ms"]
    return (
        (limits.memory_mb is None or contestant["peak_mb"] <= limits.memory_mb)
        and (limits.milliseconds is None or time_ms <= limits.milliseconds)
        and (not limits.commercial or _free(contestant))
    )


def _pareto(rows: list[dict[str, Any]], contestants: dict[str, dict[str, Any]]) -> list[str]:
    """Mark the rows within the limits that no other is nowhere worse and somewhere better than.

    Returns the keys of `PARETO` that this is over: those that every such row has.
    """
    within = [row for row in rows if row["within"]]
    # rows of one tokenizer share its time and its licence: they decide between tokenizers alone
    times = {name: one["encode_ms"] + one["decode_ms"] for name, one in contestants.items()}
    held = [row | {"ms": times[row["name"]], "free": _free(contestants[row["name"]])} for row in within]
    over = [key for key in PARETO if held and all(row[key] is not None for row in held)]
    costs = np.array([[-row[key] if PARETO[key] else row[key] for key in over] for row in held], dtype=np.float64)
    for row in rows:
        row["pareto"] = False
    for row, cost in zip(within, costs, strict=True):
        row["pareto"] = not bool(((costs <= cost).all(1) & (costs < cost).any(1)).any())
    return over


def _shown(good: dict[str, dict[str, Any]], show: int) -> list[int]:
    """Places of the pictures that tokenizers rebuild worst, each measured against its own mean, worst first."""
    count = min(len(result["rows"]) for result in good.values())
    gaps = np.zeros(count)
    for result in good.values():
        values = np.array([row["prefixes"][-1]["psnr"] for row in result["rows"][:count]])
        gaps += values - values.mean()
    return np.argsort(gaps, kind="stable")[:show].tolist()
