"""The demo's report: one HTML file with its pictures and curves inside, readable offline, in light and dark."""

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

from PIL import Image
from torch import Tensor

import vistok
from examples.demo import CODECS, Photograph, Rebuilt, Training
from vistok.evaluation.charts import DARK, STYLE, Series, line_chart
from vistok.evaluation.codecs import Coded
from vistok.files import write_atomically
from vistok.pixels import to_pil

DETAIL = 256  # pixels a side of the details, shown as they are
NAMES = {"webp": "WebP", "jpeg": "JPEG"}
TEMPLATE = Path(__file__).parent / "report.html"


def write_report(path: Path, tokenizer: Any, photographs: list[Photograph], training: Training, seconds: float) -> Path:
    """Write the report and return its path."""
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    whole = photographs[0].rebuilt[-1]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=STYLE,
        dark=DARK,
        model=escape(tokenizer.name),
        weights=tokenizer.fingerprint[:8],
        version=vistok.__version__,
        parameters=f"{parameters / 1e6:.1f} million",
        seconds=f"{seconds:.0f}",
        facts=facts(photographs),
        hero_original=uri(to_pil(photographs[0].pixels)),
        hero_rebuilt=uri(to_pil(whole.pixels)),
        hero_caption=f"{escape(photographs[0].title)}, all {whole.tokens:,} tokens: {told(whole)}",
        coarse_to_fine="\n".join(coarse_to_fine(photograph) for photograph in photographs),
        equal_bytes="\n".join(equal_bytes(photograph) for photograph in photographs),
        verdict=verdict(photographs),
        curve=line_chart(curves(photographs), "bits per pixel", "PSNR, dB", log_x=True),
        table=table(photographs),
        **training_parts(training),
    )
    write_atomically(path, page.encode())
    return path


# -- pictures ----------------------------------------------------------------------------------------------------------


def uri(image: Image.Image, quality: int = 90) -> str:
    """A picture as a data URI. The quality is high enough that what is seen are the tokenizer's errors."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def detail(photograph: Photograph, pixels: Tensor) -> str:
    """The photograph's detail, cut from `pixels` of its size, as a data URI."""
    top, left = photograph.corner
    return uri(to_pil(pixels[..., top : top + DETAIL, left : left + DETAIL]))


def figure(source: str, name: str, line: str, best: bool = False) -> str:
    """One picture with a name and a line of numbers below."""
    mark = ' class="best"' if best else ""
    return (
        f'<figure{mark}><img src="{source}" alt="{escape(name)}" loading="lazy">'
        f"<figcaption><b>{escape(name)}</b><span>{escape(line)}</span></figcaption></figure>"
    )


def coarse_to_fine(photograph: Photograph) -> str:
    """A row: the original, then what ever longer prefixes give."""
    shown = spread(photograph.rebuilt, 4)
    height, width = photograph.pixels.shape[2:]
    figures = [figure(detail(photograph, photograph.pixels), "Original", f"{width} x {height} px")]
    for part in shown:
        line = f"{part.psnr:.1f} dB, {part.bytes:,} bytes"
        figures.append(figure(detail(photograph, part.pixels), f"{part.tokens:,} tokens", line))
    return f"<h3>{escape(photograph.title)}</h3>\n" + row(figures)


def equal_bytes(photograph: Photograph) -> str:
    """Rows at a low rate and at the highest: tokens, WebP and JPEG of the same bytes, the best of them marked."""
    rebuilt = photograph.rebuilt
    parts = [f"<h3>{escape(photograph.title)}</h3>"]
    for part in [rebuilt[1], rebuilt[-1]] if len(rebuilt) > 2 else rebuilt[-1:]:
        best = max([part.psnr, *(coded.psnr for coded in part.codecs.values() if coded.fits)])
        figures = [figure(detail(photograph, photograph.pixels), "Original", f"budget {part.bytes:,} bytes")]
        line = f"{part.bytes:,} B, {part.psnr:.2f} dB"
        figures.append(figure(detail(photograph, part.pixels), "Tokens", line, part.psnr == best))
        for codec, coded in part.codecs.items():
            line = f"{coded.bytes:,} B, {coded.psnr:.2f} dB{how(coded)}"
            shown = figure(detail(photograph, coded.pixels), NAMES[codec], line, coded.psnr == best and coded.fits)
            figures.append(shown)
        parts.append(row(figures))
    return "\n".join(parts)


def how(coded: Coded) -> str:
    """What had to be done to the picture for its file to become so small."""
    said = f", scaled to 1/{coded.scale}" if coded.scale > 1 else ""
    return said + ("" if coded.fits else "; no smaller file exists")


def row(figures: Iterable[str]) -> str:
    """Figures side by side."""
    return '<div class="row">' + "".join(figures) + "</div>"


def spread(parts: list[Rebuilt], most: int) -> list[Rebuilt]:
    """The first, the last and some between."""
    if len(parts) <= most:
        return parts
    return [parts[place * (len(parts) - 1) // (most - 1)] for place in range(most)]


def told(part: Rebuilt) -> str:
    """Quality and rate in words."""
    return f"{part.psnr:.1f} dB, {part.bytes:,} bytes, {part.bits_per_pixel:.3f} bit/px"


# -- numbers -----------------------------------------------------------------------------------------------------------


def facts(photographs: list[Photograph]) -> str:
    """The few numbers that stand on top."""
    whole = [photograph.rebuilt[-1] for photograph in photographs]
    raw = mean(24 / part.bits_per_pixel for part in whole)
    pixels = sum(photograph.pixels[0, 0].numel() for photograph in photographs)
    spent = sum(photograph.encode_seconds + photograph.decode_seconds for photograph in photographs)
    entries = [
        (f"{raw:.0f} : 1", "raw pixels to packed codes, all tokens"),
        (f"{mean(part.psnr for part in whole):.1f} dB", "mean PSNR with all tokens"),
        (f"{len(photographs[0].rebuilt)}", "prefix lengths, each decodes on its own"),
        (f"{pixels / spent / 1e6:.1f}", "megapixels a second, encode and decode, on one core"),
    ]
    return "".join(f"<div><b>{value}</b><span>{text}</span></div>" for value, text in entries)


def curves(photographs: list[Photograph]) -> list[Series]:
    """Mean PSNR over mean bits per pixel: the tokens, packed and as compressed files, and each codec."""
    steps = list(zip(*(photograph.rebuilt for photograph in photographs), strict=True))
    rates = [mean(part.bits_per_pixel for part in step) for step in steps]
    found = [Series("tokens", [(rate, mean(p.psnr for p in step)) for rate, step in zip(rates, steps, strict=True)])]
    files = [mean(part.file_bits_per_pixel for part in step) for step in steps]
    quality = [y for _, y in found[0].points]
    found.append(Series("compressed", list(zip(files, quality, strict=True)), dashed=True, colour=0))
    for place, codec in enumerate(CODECS, 1):
        points = [
            (rate, mean(part.codecs[codec].psnr for part in step))
            for rate, step in zip(rates, steps, strict=True)
            if all(part.codecs[codec].fits for part in step)
        ]
        found.append(Series(NAMES[codec], points, colour=place))
    return found


def verdict(photographs: list[Photograph]) -> str:
    """Who leads where, read off the numbers."""
    steps = list(zip(*(photograph.rebuilt for photograph in photographs), strict=True))
    told = []
    for codec in CODECS:
        ahead = [
            mean(part.bits_per_pixel for part in step)
            for step in steps
            if not all(part.codecs[codec].fits for part in step)
            or mean(part.psnr for part in step) > mean(part.codecs[codec].psnr for part in step)
        ]
        name = NAMES[codec]
        if len(ahead) == len(steps):
            told.append(f"The tokens have the higher mean PSNR than {name} at every rate here.")
        elif not ahead:
            told.append(f"{name} has the higher mean PSNR at every rate here.")
        else:
            told.append(
                f"Of {len(steps)} rates the tokens have the higher mean PSNR than {name} at {len(ahead)}, "
                f"{name} at {len(steps) - len(ahead)} (the tokens up to {max(ahead):.3f} bits per pixel)."
            )
    return " ".join(told)


def table(photographs: list[Photograph]) -> str:
    """Means over the photographs, one row per prefix."""
    steps = list(zip(*(photograph.rebuilt for photograph in photographs), strict=True))
    lines = []
    for step in steps:
        cells = [f"{mean(part.bits_per_pixel for part in step):.4f}", f"{mean(part.bytes for part in step):,.0f}"]
        cells.append(f"{mean(part.file_bits_per_pixel for part in step):.4f}")
        cells += [f"{mean(part.psnr for part in step):.2f}", f"{mean(part.ssim for part in step):.3f}"]
        for codec in CODECS:
            fits = [part.codecs[codec] for part in step if part.codecs[codec].fits]
            if len(fits) == len(step):
                cells.append(f"{mean(coded.psnr for coded in fits):.2f}")
            else:
                cells.append(f"cannot: {len(step) - len(fits)} of {len(step)}")
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ["bits/pixel", "bytes", "compressed", "tokens, dB", "SSIM", *(f"{NAMES[codec]}, dB" for codec in CODECS)]
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def training_parts(training: Training) -> dict[str, str]:
    """What the page says about the small training."""
    names = {"psnr": "all"}
    qualities = [
        Series(names.get(key, key.replace("psnr@", "first ")), points, markers=False)
        for key, points in training.qualities.items()
    ]
    last = training.qualities["psnr"][-1][1]
    return {
        "recipe": training.recipe,
        "steps": f"{training.steps:,}",
        "training_seconds": f"{training.seconds:.0f}",
        "small_parameters": f"{training.parameters:,}",
        "final_psnr": f"{last:.2f}",
        "loss_curve": line_chart([Series("loss", smooth(training.losses), colour=1, markers=False)], "step", "loss"),
        "psnr_curve": line_chart(qualities, "step", "PSNR of held-out squares, dB"),
        "grid_first": uri(training.first, 95),
        "grid_last": uri(training.last, 95),
        "first_step": str(training.first_step),
    }


def smooth(points: list[tuple[float, float]], over: int = 5) -> list[tuple[float, float]]:
    """Means of neighbouring points, so that a noisy curve shows where it goes."""
    return [
        (points[place][0], mean(y for _, y in points[max(0, place - over + 1) : place + 1]))
        for place in range(len(points))
    ]
