"""CLIP score: how well a picture fits its caption, as CLIP sees it (arXiv:2104.08718, network of arXiv:2103.00020).

    uint8 (B, 3, H, W) --shorter side to S, bicubic --middle S x S--> image tower -> unit vectors (B, W) \\
                                                                                                        cosine -> score
    B captions -----tokens, at most as many as the network reads----> text tower --> unit vectors (B, W) /

| variant | score of a picture | of |
| --- | --- | --- |
| 100 | 100 max(cos, 0) | papers on text to image, torchmetrics |
| hessel | 2.5 max(cos, 0) | the paper |

The value of a set is the mean over its pictures. It depends on the network as a Frechet distance does (ViT-B/32 and
ViT-L/14 share no scale), so `protocol` names it with a hash. The score of a reconstruction says something beside that
of its original alone. Pictures are resized with Pillow in 8 bits, as OpenAI's code does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vistok.errors import InputError, MismatchError, UnknownNameError, nearest
from vistok.extras import import_extra
from vistok.losses.representation import CLIP
from vistok.metrics.extractors import network_hash

NETWORKS = {
    "clip-b32": "openai/clip-vit-base-patch32",
    "clip-b16": "openai/clip-vit-base-patch16",
    "clip-l14": "openai/clip-vit-large-patch14",
}
VARIANTS = {"100": 100.0, "hessel": 2.5}
DEFAULT = "clip-l14"


def clip_score(pictures: Tensor, texts: Tensor, variant: str = "100") -> Tensor:
    """Scores (B,) of embeddings (B, W) and (B, W), each pair alone; never negative.

    Raises UnknownNameError for another variant, InputError for shapes that do not belong together.
    """
    if variant not in VARIANTS:
        raise UnknownNameError(
            f"no variant {variant!r}{nearest(variant, list(VARIANTS)) or f'; there are {list(VARIANTS)}'}"
        )
    if pictures.ndim != 2 or pictures.shape != texts.shape:
        raise InputError(f"embeddings {tuple(pictures.shape)} and {tuple(texts.shape)}; expected (B, W) of both")
    return VARIANTS[variant] * F.cosine_similarity(pictures.float(), texts.float()).clamp_min(0)


class ClipScore:
    """A CLIP of the `transformers` package as a judge; see the module's docstring and `build_clip_score`.

    name  as it is reported
    hash  the first 12 hexadecimal digits of a SHA-256 of its weights
    side  S, of its pictures
    """

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: Any,
        mean_deviation: tuple[Sequence[float], Sequence[float]] = CLIP,
        variant: str = "100",
    ) -> None:
        self.name, self.network, self.tokenizer = name, network.eval().requires_grad_(False), tokenizer
        self.variant, self.hash = variant, network_hash(network)
        self.side = int(network.config.vision_config.image_size)
        self.length = int(network.config.text_config.max_position_embeddings)
        self._mean, self._deviation = (torch.tensor(values)[:, None, None] for values in mean_deviation)

    @property
    def protocol(self) -> dict[str, Any]:
        """What a result has to say of this score."""
        return {
            "variant": f"{VARIANTS[self.variant]:g} max(cos, 0)",
            "extractor": self.name,
            "extractor weights": self.hash,
            "extractor resize": "shorter side, bicubic (Pillow)",
            "extractor crop": "middle square",
            "extractor side": self.side,
            "caption tokens": self.length,
        }

    def to(self, device: torch.device | str) -> "ClipScore":
        """Move the network. Returns itself."""
        self.network.to(device)
        return self

    def __call__(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """Scores (B,) of uint8 (B, 3, H, W) with their captions, float32 on the CPU. Raises what its parts raise."""
        if len(captions) != len(pixels):
            raise InputError(f"{len(pixels)} pictures and {len(captions)} captions; expected one for each")
        return clip_score(self.pictures(pixels), self.texts(captions), self.variant)

    @torch.no_grad()
    def pictures(self, pixels: Tensor) -> Tensor:
        """Image embeddings (B, W) of uint8 (B, 3, H, W), float32 on the CPU. Raises InputError for other pixels."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"pixels {pixels.dtype} {tuple(pixels.shape)}; a CLIP score takes uint8 (B, 3, H, W)")
        cut = np.stack([_square(one, self.side) for one in pixels.permute(0, 2, 3, 1).cpu().numpy()])
        shifted = (torch.from_numpy(cut).permute(0, 3, 1, 2).float() / 255 - self._mean) / self._deviation
        return _pooled(self.network.get_image_features(pixel_values=shifted.to(self._device)))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings (B, W), float32 on the CPU; what is longer than the network reads is cut off."""
        held = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        inputs = {key: held[key].to(self._device) for key in ("input_ids", "attention_mask")}
        return _pooled(self.network.get_text_features(**inputs))

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def build_clip_score(name: str = DEFAULT, variant: str = "100") -> ClipScore:
    """A judge by name (`NETWORKS`), by a folder that `save_pretrained` wrote, or by an id on the Hugging Face Hub.

    Raises MissingExtraError without `transformers`, MismatchError where no CLIP with its tokenizer can be had there,
    UnknownNameError for another variant.
    """
    if variant not in VARIANTS:
        raise UnknownNameError(
            f"no variant {variant!r}{nearest(variant, list(VARIANTS)) or f'; there are {list(VARIANTS)}'}"
        )
    transformers = import_extra("transformers", "models")
    where = NETWORKS.get(name, name)
    try:
        network = transformers.CLIPModel.from_pretrained(where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise MismatchError(
            f"the CLIP score: no CLIP with its tokenizer at {where} ({(str(error).splitlines() or [''])[0]}); give a "
            f"folder that transformers has saved both into, an id on the Hub, or one of {', '.join(NETWORKS)}"
        ) from error
    shown = name.rstrip("/").rpartition("/")[2]  # a folder's own name, not where it lies
    return ClipScore(shown, network, tokenizer, _standard(where), variant)


def _standard(where: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of its preprocessor, OpenAI's where there is none."""
    import json

    from transformers.utils import cached_file

    try:
        path = cached_file(
            where,
            "preprocessor_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        path = None
    if path is None:
        return CLIP
    with open(path, encoding="utf-8") as file:
        held = json.load(file)
    return held.get("image_mean", CLIP[0]), held.get("image_std", CLIP[1])


def _square(picture: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) to (side, side, 3)."""
    image = Image.fromarray(picture)
    scale = side / min(image.size)
    size = tuple(side if length == min(image.size) else int(length * scale) for length in image.size)
    image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _pooled(found: Any) -> Tensor:
    """The embeddings, which older versions of transformers give bare."""
    return (found if isinstance(found, Tensor) else found.pooler_output).float().cpu()
