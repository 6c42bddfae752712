"""TokBench's scores: how much of text and faces survives a tokenizer, by their size in the picture (arXiv:2505.18142).

    instances (ratio, score) --bins by relative size--> mean of each bin --> the unweighted mean of the bins

A setting is the side at which pictures are rebuilt; bins are half-open and instances below the first edge do not count.
An empty bin is NaN, and so is then the mean.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from vistok.data.images import read_image
from vistok.errors import FormatError, InputError, UnknownNameError, nearest
from vistok.evaluation.readers import Faces, Reader
from vistok.evaluation.reconstruction import fitting, prefix_lengths
from vistok.metrics.psnr import psnr
from vistok.metrics.text import reading
from vistok.tokenizer import Tokenizer

TEXT_EDGES: dict[str, tuple[float, ...]] = {
    "256": (0.02, 0.03, 0.04, 1.0),
    "512": (0.01, 0.02, 0.03, 1.0),
    "1024": (0.005, 0.01, 0.02, 1.0),
}
FACE_EDGES: dict[str, tuple[float, ...]] = {
    "256": (0.0, 0.1, 0.2, 1.0),
    "512": (0.0, 0.05, 0.2, 1.0),
    "1024": (0.0, 0.05, 0.1, 1.0),
}


@dataclass(frozen=True)
class TextInstance:
    """A word: its relative size, whether it was read right, and 1 - its normalised edit distance."""

    ratio: float
    accuracy: float
    ned: float


@dataclass(frozen=True)
class FaceInstance:
    """A face: its relative size, and the cosine of its embedding to the original's."""

    ratio: float
    similarity: float


@dataclass(frozen=True)
class Binned:
    """Means by size, small to large, how many instances each has, and the mean of the means.

    `overall` is the plain mean of all instances, those below the first edge among them.
    """

    edges: tuple[float, ...]
    bins: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float
    overall: float


def score_text(instances: Iterable[TextInstance], setting: str) -> dict[str, Binned]:
    """T-ACC and T-NED of the words of all sets together. Raises UnknownNameError for an unknown setting."""
    edges, found = _edges(TEXT_EDGES, setting), list(instances)
    return {
        "t-acc": binned([(one.ratio, one.accuracy) for one in found], edges),
        "t-ned": binned([(one.ratio, one.ned) for one in found], edges),
    }


def score_faces(instances: Iterable[FaceInstance], setting: str) -> dict[str, Binned]:
    """F-Sim of faces. Raises UnknownNameError for an unknown setting."""
    return {"f-sim": binned([(one.ratio, one.similarity) for one in instances], _edges(FACE_EDGES, setting))}


def binned(scores: list[tuple[float, float]], edges: tuple[float, ...]) -> Binned:
    """Scores [(size, score)] by size, in the half-open bins between `edges`."""
    parts = [[s for ratio, s in scores if low <= ratio < high] for low, high in pairwise(edges)]
    means = tuple(fmean(part) if part else nan for part in parts)
    return Binned(edges, means, tuple(map(len, parts)), fmean(means), fmean(s for _, s in scores) if scores else nan)


def _edges(table: dict[str, tuple[float, ...]], setting: str) -> tuple[float, ...]:
    if setting not in table:
        raise UnknownNameError(f"no setting {setting!r}{nearest(setting, list(table)) or f'; there are {list(table)}'}")
    return table[setting]


# -- on pictures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokBench:
    """What `tokbench` gives for one tokenizer.

    text, faces  binned scores by name; empty where there were no words, or no faces or no embedding
    words        words that counted, of `annotated` ones: the others the reader misreads on the original already
    psnr         mean over the pictures, for comparison
    """

    model: str
    weights: str
    setting: str
    text: dict[str, Binned]
    faces: dict[str, Binned]
    words: int
    annotated: int
    pictures: int
    psnr: float
    details: list[dict[str, Any]]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Scene:
    """A picture of the benchmark: its file, words [(text, box, ratio)] and faces [(key points (5, 2), ratio)]."""

    path: Path
    name: str
    words: list[tuple[str, tuple[int, int, int, int], float]]
    faces: list[tuple[np.ndarray, float]]


def scenes(folder: Path) -> list[Scene]:
    """The pictures of a folder in TokBench's layout: annotations/text_*.json and annotations/face_meta.json.

    Raises InputError where there are none, FormatError for a file of another form.
    """
    found: dict[str, Scene] = {}

    def scene(name: str) -> Scene:
        if name not in found:
            path = next(
                (folder / part / name for part in ("", "images") if (folder / part / name).exists()), folder / name
            )
            found[name] = Scene(path, name, [], [])
        return found[name]

    for file in sorted((folder / "annotations").glob("*.json")):
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
            if file.name == "face_meta.json":
                for row in rows:
                    points = [
                        (np.asarray(face["kps"], dtype=np.float64), float(face["ratio"])) for face in row["faces"]
                    ]
                    scene(row["image_name"]).faces.extend(points)
            elif file.name.startswith("text_"):
                for row in rows:
                    words = [
                        (word["rec"], tuple(round(v) for v in word["bbox"]), float(word["ratio"]))
                        for word in row["annotations"]
                    ]
                    scene(row["file_name"]).words.extend(words)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{file} is not in TokBench's form: {type(error).__name__} {error}") from error
    if not found:
        raise InputError(f"{folder} has no annotations/text_*.json and no annotations/face_meta.json")
    return list(found.values())


def tokbench(
    tokenizer: Tokenizer,
    where: Sequence[Scene],
    setting: str,
    reader: Reader,
    *,
    faces: Faces | None = None,
    refine: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> TokBench:
    """Rebuild every scene at `setting` pixels (its longer side), back to its own size, and read the words again.

    refine: leave out words that the reader misreads on the original, as the benchmark does. faces: embeddings; without
    them faces do not count. Raises InputError for a scene whose file cannot be read, or where no word is left.
    """
    _edges(TEXT_EDGES, setting)
    words, similar, details, quality, annotated = [], [], [], [], 0
    for number, scene in enumerate(where):
        original = np.asarray(read_image(scene.path))
        rebuilt = rebuilt_at(tokenizer, original, int(setting))
        quality.append(float(psnr(_planes(rebuilt[0]), _planes(original))[0]))
        annotated += len(scene.words)
        (found,) = judged(scene, original, rebuilt, reader, faces, refine=refine)
        words += found.words
        similar += found.faces
        for (true, box, ratio), read in zip(found.kept, found.reads, strict=True):
            details.append({"file": scene.name, "true": true, "read": read, "ratio": ratio, "box": list(box)})
        if progress is not None:
            progress(number + 1, len(where))
    if not words and not similar:
        raise InputError("no word is left that the reader gets right on the originals, and no face: nothing to score")
    return TokBench(
        model=tokenizer.name,
        weights=tokenizer.fingerprint,
        setting=setting,
        text=score_text(words, setting) if words else {},
        faces=score_faces(similar, setting) if similar else {},
        words=len(words),
        annotated=annotated,
        pictures=len(where),
        psnr=fmean(quality),
        details=details,
    )


@dataclass(frozen=True)
class Judged:
    """One rebuilt scene: its words and faces with their scores, and what was read for the words that count."""

    words: list[TextInstance]
    faces: list[FaceInstance]
    kept: list[tuple[str, tuple[int, int, int, int], float]]
    reads: list[str]


def judged(
    scene: Scene,
    original: np.ndarray,
    rebuilt: Sequence[np.ndarray],
    reader: Reader | None,
    faces: Faces | None = None,
    *,
    refine: bool = True,
) -> list[Judged]:
    """Every rebuilt picture uint8 (H, W, 3) against the original; see `tokbench`. The original is read once."""
    kept = scene.words if reader is not None else []
    if reader is not None and refine and kept:
        seen = reader([_crop(original, box) for _, box, _ in kept])
        kept = [word for word, read in zip(kept, seen, strict=True) if read == word[0]]
    embed = faces is not None and bool(scene.faces)
    known = faces([(original, points) for points, _ in scene.faces]) if faces is not None and embed else None
    found = []
    for picture in rebuilt:
        reads = reader([_crop(picture, box) for _, box, _ in kept]) if reader is not None and kept else []
        words, similar = [], []
        for (true, _, ratio), read in zip(kept, reads, strict=True):
            how = reading(true, read)
            words.append(TextInstance(ratio, float(how.raw), 1 - how.raw_ned))
        if faces is not None and known is not None:
            now = faces([(picture, points) for points, _ in scene.faces])
            cosine = (known * now).sum(1) / (np.linalg.norm(known, axis=1) * np.linalg.norm(now, axis=1))
            similar = [FaceInstance(r, float(c)) for (_, r), c in zip(scene.faces, cosine, strict=True)]
        found.append(Judged(words, similar, kept, reads))
    return found


def rebuilt_at(tokenizer: Tokenizer, picture: np.ndarray, longest: int, *, every: bool = False) -> list[np.ndarray]:
    """Through the tokenizer with the longer side at `longest` pixels, and back to the picture's own size.

    One picture uint8 (H, W, 3) from all tokens, or with `every` one from each of `prefix_lengths`, shortest first.
    """
    image = Image.fromarray(picture)
    scale = longest / max(image.size)
    small = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    tokens = tokenizer.encode(small, on_size=fitting(tokenizer.spec, (small.height, small.width)))
    lengths = prefix_lengths(tokenizer.spec.of(tokens.canvas[0])) if every else [tokens.length]
    found = []
    for length in lengths:
        shorter = tokens if length == tokens.length else tokens.prefix(length)
        pixels = tokenizer.decode(shorter, dtype=torch.uint8)[0].permute(1, 2, 0).cpu().numpy()
        found.append(np.asarray(Image.fromarray(pixels).resize(image.size, Image.Resampling.BICUBIC)))
    return found


def _crop(picture: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    left, top, right, bottom = box
    return picture[max(0, top) : max(bottom, top + 1), max(0, left) : max(right, left + 1)]


def _planes(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
