"""Words rendered onto photographs, with their boxes, in TokBench's layout: text whose truth is known, for any machine.

    photographs --crop--> words in many fonts, heights, colours and scripts --> images/0000.png ..
                                                                                annotations/text_rendered.json

annotations are a list of {file_name, height, width, annotations: [{rec, bbox: [x1, y1, x2, y2], ratio}]}; ratio is the
height of the word over the longer side of the picture. Words do not overlap, and each stands out from what is under it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vistok.errors import InputError
from vistok.files import write_atomically

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts")
SCRIPTS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "latin": "anchor basket candle dragon engine forest garden harbour island jacket kitchen lantern market needle "
        "orange planet quarter river silver table umbrella valley window yellow zebra Bridge Castle Doctor",
        "accented": "naïve façade Zürich señor crème fjørd garçon übung",
        "numbers": "1024 37.5 2026 $19.99 50% 8-16 +44 100,000",
        "capitals": "EXIT SALE OPEN HOTEL TAXI STOP CAFE MUSEUM",
        "cyrillic": "город книга окно дерево улица вода",
        "greek": "θάλασσα ήλιος δρόμος βιβλίο",
        "chinese": "出口 图书馆 火车站 咖啡 北京",
    }.items()
}
SIZES = (0.02, 0.03, 0.045, 0.07, 0.11)  # heights over the longer side: small, medium and large of TokBench at 256 px


def fonts(text: str | None = None) -> list[Path]:
    """TrueType and OpenType files of this machine, sorted; with `text`, those that can draw every letter of it."""
    found = sorted(
        path
        for folder in FOLDERS
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc") and not path.name.startswith(".")
    )
    return found if text is None else [path for path in found if _draws(path, text)]


def render(
    photograph: Image.Image,
    words: int,
    rng: np.random.Generator,
    scripts: Sequence[str] = ("latin", "numbers", "capitals"),
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A copy of a photograph with up to `words` words on it, and their annotations. Raises InputError for a script."""
    unknown = sorted(set(scripts) - set(SCRIPTS))
    if unknown:
        raise InputError(f"no script {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    image = photograph.convert("RGB")
    draw = ImageDraw.Draw(image)
    taken: list[tuple[int, int, int, int]] = []
    found: list[dict[str, Any]] = []
    longest = max(image.size)
    for _ in range(20 * words):
        if len(found) == words:
            break
        word = str(rng.choice(SCRIPTS[str(rng.choice(list(scripts)))]))
        height = max(6, round(longest * float(rng.choice(SIZES)) * rng.uniform(0.9, 1.2)))
        font = _font(word, height, rng)
        if font is None:
            continue
        left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
        width, tall = int(right - left), int(bottom - top)
        if width + 4 >= image.width or tall + 4 >= image.height:
            continue
        x, y = int(rng.integers(2, image.width - width - 1)), int(rng.integers(2, image.height - tall - 1))
        box = (x, y, x + width, y + tall)
        if any(box[0] < b[2] + 4 and b[0] < box[2] + 4 and box[1] < b[3] + 4 and b[1] < box[3] + 4 for b in taken):
            continue
        draw.text((x - left, y - top), word, font=font, fill=contrasting(image, box, rng))
        taken.append(box)
        found.append({"rec": word, "bbox": list(box), "ratio": tall / longest})
    return image, found


def write_text_bench(
    folder: Path,
    photographs: Iterable[Image.Image],
    *,
    words: int = 8,
    seed: int = 0,
    scripts: Sequence[str] = ("latin", "numbers", "capitals"),
    name: str = "rendered",
) -> Path:
    """Write the pictures and their annotations below `folder`, and return the annotation file.

    Every picture's words depend on the seed and on its number alone. Raises InputError without photographs.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, photograph in enumerate(photographs):
        image, annotations = render(photograph, words, np.random.default_rng([seed, number]), scripts)
        file = f"images/{number:04d}.png"
        write_atomically(folder / file, lambda path, image=image: image.save(path, "PNG"))  # type: ignore[misc]
        rows.append({"file_name": file, "height": image.height, "width": image.width, "annotations": annotations})
    if not rows:
        raise InputError("no photographs to write on")
    target = folder / "annotations" / f"text_{name}.json"
    write_atomically(target, json.dumps(rows, ensure_ascii=False, indent=1).encode())
    return target


def contrasting(image: Image.Image, box: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[int, ...]:
    """A random colour whose brightness is at least 100 levels from what is under the box."""
    under = np.asarray(image.crop(box).convert("L"), dtype=np.float64).mean()
    for _ in range(50):
        colour = rng.integers(0, 256, 3)
        if abs(float(colour @ np.array([0.299, 0.587, 0.114])) - under) >= 100:
            return tuple(map(int, colour))
    return (0, 0, 0) if under > 127 else (255, 255, 255)


# -- inside ------------------------------------------------------------------------------------------------------------


def _font(word: str, height: int, rng: np.random.Generator) -> Any:
    """A font of this machine that draws the word, or Pillow's own for Latin letters; None where there is none."""
    able = fonts(word)
    if not able:
        return ImageFont.load_default(height) if word.isascii() else None
    return ImageFont.truetype(str(able[int(rng.integers(len(able)))]), height)


_KNOWN: dict[tuple[Path, str], bool] = {}


def _draws(path: Path, text: str) -> bool:
    """Whether a font has a glyph of its own for every letter: one that it lacks looks like one that nobody has."""
    for letter in set(text):
        key = (path, letter)
        if key not in _KNOWN:
            try:
                font = ImageFont.truetype(str(path), 24)
                missing = bytes(font.getmask("\U0010ffff"))
                _KNOWN[key] = bytes(font.getmask(letter)) not in (missing, b"")
            except (OSError, ValueError):
                _KNOWN[key] = False
        if not _KNOWN[key]:
            return False
    return True
