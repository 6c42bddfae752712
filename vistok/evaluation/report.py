"""The page of a comparison, and the same numbers as JSON and as a table in Markdown.

rows, pictures of every contestant --compare.html--> one file that works without a network: curves, pictures, maps
"""

import base64
import io
import json
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vistok.data.items import Source
from vistok.evaluation.charts import STYLE, Series, line_chart
from vistok.evaluation.fidelity import MEASURES as FIDELITY
from vistok.evaluation.protocols import evaluation_crop
from vistok.files import write_atomically

COLUMNS = {"t_acc": "words right", "t_ned": "text 1 - NED", "f_sim": "faces"}


def original(source: Source, place: int, size: int) -> torch.Tensor:
    """A picture of `source` as it is compared, uint8 (1, 3, H, W): the crop's, or whole where `size` is 0."""
    image = source[place].image
    cut = evaluation_crop(image, size) if size else np.asarray(image)
    return torch.from_numpy(cut.copy()).permute(2, 0, 1)[None]


def write_report(
    report: Path,
    result: dict[str, Any],
    found: dict[str, dict[str, Any]],
    coded: dict[str, dict[str, Any]],
    shown: list[int],
    source: Source,
    size: int,
) -> None:
    """Write the page, and the same numbers beside it as .json and .md. Raises OutputError where that cannot be.

    result: what `compare` returns. found, coded: results of tokenizers and codecs, with the folders of their pictures.
    shown: places of the pictures that are in the page.
    """
    everyone = {name: one for name, one in (*found.items(), *coded.items()) if "error" not in one}
    first = next(iter(everyone.values()))
    pictures = []
    for place in shown:
        row = first["rows"][place]
        before = original(source, row["place"], size)[0].permute(1, 2, 0).numpy()
        entries = []
        for name, one in everyone.items():
            path = Path(one["folder"]) / "pictures" / f"{place:04d}.png"
            numbers = one["rows"][place]["prefixes"][-1]
            with Image.open(path) as image:
                entry = {"name": name, "picture": _inline(np.asarray(image)), "map": one["rows"][place]["map"]}
            entries.append(entry | {key: numbers[key] for key in ("bpp", "psnr", "ssim")})
        pictures.append({"id": row["id"], "original": _inline(before), "rebuilt": entries})
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
    labels = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "t_ned": "text, 1 - edit distance"}
    labels |= {"f_sim": "faces, cosine"}
    for key, label in labels.items():
        if key in FIDELITY and all(row[key] is None for row in result["rows"]):
            continue
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
    measured = [key for key in FIDELITY if any(row[key] is not None for row in result["rows"])]
    heads = ["tokens", "bits/pixel", "PSNR dB", "SSIM", "MS-SSIM", *(COLUMNS[key] for key in measured), "Pareto"]
    lines = [
        f"{result['pictures']} pictures of {result['data']}, "
        + (f"centre crops of {result['size']} x {result['size']}" if result["size"] else "whole"),
        "",
        f"| | {' | '.join(heads)} |",
        "| --- " * (len(heads) + 1) + "|",
    ]
    for row in result["rows"]:
        cells = [
            row["name"],
            "" if row["tokens"] is None else f"{row['tokens']:.0f}",
            f"{row['bpp']:.4f}",
            f"{row['psnr']:.2f}",
            f"{row['ssim']:.4f}",
            "" if row["ms_ssim"] is None else f"{row['ms_ssim']:.4f}",
            *("" if row[key] is None else f"{row[key]:.4f}" for key in measured),
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
    told = result["fidelity"]
    read = []
    if "words" in told:
        read.append(f"{told['words']} words read by {told['reader']}")
    if "faces" in told:
        read.append(f"{told['faces']} faces embedded by {told['embedder']}")
    lines += ["", f"Pareto over {', '.join(result['pareto_over']) or 'nothing: no row is within the limits'}."]
    if read:
        lines.append(f"{'; '.join(read)}; rebuilt at {told['setting']} pixels.")
    lines += ["", *result["notes"], *(f"failed: {name}: {error}" for name, error in result["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _inline(pixels: np.ndarray) -> str:
    """A picture as a data URL, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=50)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
