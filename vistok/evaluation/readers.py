"""What reads words and knows faces in the text and face benchmarks: RapidOCR, or anything of one's own.

    Reader    list of uint8 (h, w, 3) -> list of str
    Faces     list of (picture uint8 (H, W, 3), key points (5, 2)) -> unit vectors (n, D)

`build_reader("rapidocr")`, or `"package.module:name"`, which is called once without arguments and gives the function.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from vistok.errors import UnknownNameError, VistokError
from vistok.extras import import_extra

Reader = Callable[[Sequence[np.ndarray]], list[str]]
Faces = Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], np.ndarray]


def build_reader(name: str = "rapidocr") -> Reader:
    """A reader by name. Raises UnknownNameError for a name that is none, MissingExtraError without the package."""
    return rapidocr() if name == "rapidocr" else load(name)


def load(name: str) -> Any:
    """What "package.module:name" gives when it is called. Raises UnknownNameError, or VistokError where that fails."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UnknownNameError(f"no {name!r} here; name your own as package.module:function")
    try:
        return getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise VistokError(f"cannot get {attribute} of {module}: {error}") from error


def rapidocr() -> Reader:
    """RapidOCR's recogniser (PP-OCR through ONNX, its models come with the package), on crops of one line."""
    engine = _engine()

    def read(crops: Sequence[np.ndarray]) -> list[str]:
        found = []
        for crop in crops:
            if min(crop.shape[:2]) < 2:
                found.append("")
                continue
            texts = engine(np.ascontiguousarray(crop[..., ::-1]), use_det=False, use_cls=False, use_rec=True).txts
            found.append(texts[0] if texts else "")
        return found

    return read


def rapidocr_pages() -> Callable[[np.ndarray], str]:
    """RapidOCR on whole pictures: lines from top to bottom, joined by line breaks."""
    engine = _engine()

    def read(picture: np.ndarray) -> str:
        found = engine(np.ascontiguousarray(picture[..., ::-1]))
        if not found.txts:
            return ""
        order = np.argsort([np.asarray(box)[:, 1].min() for box in found.boxes], kind="stable")
        return "\n".join(found.txts[place] for place in order)

    return read


def _engine() -> Any:
    """RapidOCR, with as many threads as torch has."""
    import torch

    settings = {"Global.log_level": "error"} | {
        f"EngineConfig.onnxruntime.{kind}_op_num_threads": torch.get_num_threads() for kind in ("intra", "inter")
    }
    return import_extra("rapidocr", "bench").RapidOCR(params=settings)
