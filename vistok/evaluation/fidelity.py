"""Text and face fidelity of a tokenizer at every prefix length: two of the numbers by which `vistok compare` chooses.

    scenes --rebuilt from each prefix--> words read again     -> share read right, 1 - edit distance   (t_acc, t_ned)
                                         faces embedded again -> cosine to the original's              (f_sim)

Scenes are TokBench's (`vistok.evaluation.tokbench`), or photographs with words written on them here. Means are over all
words and faces, not over bins of size: a sample of some dozen words leaves bins empty. A reader or an embedder that is
not there is a note, and its numbers stay empty.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vistok.data.images import read_image
from vistok.data.rendered_text import write_text_bench
from vistok.data.samples import photographs
from vistok.errors import InputError, VistokError
from vistok.evaluation.readers import build_reader, load
from vistok.evaluation.tokbench import Judged, Scene, judged, rebuilt_at, scenes
from vistok.tokenizer import Tokenizer

SAMPLE = "sample"
PHOTOGRAPHS, WORDS = 6, 8  # of the sample: as many as are read in some seconds
MEASURES = ("t_acc", "t_ned", "f_sim")


@dataclass(frozen=True)
class Fidelity:
    """What is measured, and by whom.

    text      "sample", words written on photographs that come with scikit-image; or a folder in TokBench's layout
    faces     a folder in TokBench's layout, with annotations/face_meta.json
    reader    reads words: "rapidocr", or "package.module:function"
    embedder  knows faces: "package.module:function"
    setting   pixels of the longer side at which scenes are rebuilt
    """

    text: str | None = None
    faces: str | None = None
    reader: str = "rapidocr"
    embedder: str | None = None
    setting: int = 256

    def __bool__(self) -> bool:
        return self.text is not None or self.faces is not None

    def plain(self) -> dict[str, Any]:
        """As JSON values; `Fidelity(**plain)` is the same again."""
        return asdict(self)


def prepared(wanted: Fidelity, folder: Path) -> tuple[Fidelity, list[str]]:
    """What of it can be measured here, with the sample written below `folder`, and a note on all that cannot.

    Raises InputError and FormatError for a folder of the user's that is not in TokBench's layout.
    """
    notes = []
    if wanted.faces is not None:
        if not any(scene.faces for scene in scenes(Path(wanted.faces))):
            raise InputError(f"{wanted.faces} has no annotations/face_meta.json with faces")
        try:
            if wanted.embedder is None:
                raise VistokError("no embedder; name one of your own with --embedder package.module:function")
            load(wanted.embedder)
        except VistokError as error:
            notes.append(f"faces are not measured: {error}")
            wanted = replace(wanted, faces=None)
    if wanted.text is not None:
        if wanted.text != SAMPLE and not any(scene.words for scene in scenes(Path(wanted.text))):
            raise InputError(f"{wanted.text} has no annotations/text_*.json with words")
        try:
            build_reader(wanted.reader)
            if wanted.text == SAMPLE:
                if not (folder / "annotations").is_dir():
                    write_text_bench(folder, photographs(PHOTOGRAPHS), words=WORDS)
                wanted = replace(wanted, text=str(folder))
        except VistokError as error:
            notes.append(f"text is not measured: {error}")
            wanted = replace(wanted, text=None)
    return wanted, notes


def jobs(wanted: Fidelity) -> list[tuple[Scene, bool]]:
    """What `measure_fidelity` goes through: scenes, and whether it is for their words or for their faces."""
    found: list[tuple[Scene, bool]] = []
    if wanted.text is not None:
        found += [(scene, True) for scene in scenes(Path(wanted.text)) if scene.words]
    if wanted.faces is not None:
        found += [(scene, False) for scene in scenes(Path(wanted.faces)) if scene.faces]
    return found


def measure_fidelity(
    tokenizer: Tokenizer, wanted: Fidelity, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """JSON values: "prefixes", `MEASURES` by name for each prefix, shortest first; how many "words" and "faces".

    Words that the reader misreads on the original do not count. What was not asked for is None.
    Raises InputError where nothing is left to score, and what reader, embedder and tokenizer raise.
    """
    by_prefix: list[list[Judged]] = []
    reader = build_reader(wanted.reader) if wanted.text is not None else None
    embedder = load(wanted.embedder) if wanted.faces is not None and wanted.embedder is not None else None
    rounds = jobs(wanted)
    for number, (scene, of_text) in enumerate(rounds):
        original = np.asarray(read_image(scene.path))
        rebuilt = rebuilt_at(tokenizer, original, wanted.setting, every=True)
        found = judged(scene, original, rebuilt, reader if of_text else None, None if of_text else embedder)
        if by_prefix and len(found) != len(by_prefix):  # pictures of several sizes: counted from all tokens down
            count = min(len(found), len(by_prefix))
            found, by_prefix = found[-count:], by_prefix[-count:]
        for place, one in enumerate(found):
            if place == len(by_prefix):
                by_prefix.append([])
            by_prefix[place].append(one)
        if progress is not None:
            progress(number + 1, len(rounds))
    rows = [_means(part) for part in by_prefix]
    words, faces = (sum(len(getattr(one, kind)) for one in by_prefix[-1]) if rows else 0 for kind in ("words", "faces"))
    if not words and not faces:
        raise InputError("no word is left that the reader gets right on the originals, and no face: nothing to score")
    return {"prefixes": rows, "words": words, "faces": faces, "pictures": len(rounds)}


def _means(part: list[Judged]) -> dict[str, float | None]:
    words, faces = [w for one in part for w in one.words], [f for one in part for f in one.faces]
    return {
        "t_acc": fmean(word.accuracy for word in words) if words else None,
        "t_ned": fmean(word.ned for word in words) if words else None,
        "f_sim": fmean(face.similarity for face in faces) if faces else None,
    }
