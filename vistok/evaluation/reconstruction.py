"""How well a tokenizer rebuilds a data set, at every prefix length: what `vistok eval` prints.

    source --crop--> uint8 (B, 3, S, S) --encode--> Tokens --prefix(k), decode--> uint8 --> PSNR, SSIM, MS-SSIM
                                              |                                    \\--> features -> rFID and the like
                                              |                                    \\--> with its caption -> CLIP score
                                              \\--> bits per pixel, codebook usage, images/s

A result says by what protocol it came about: the crop, the resize filter, the rounding, the number of pictures and a
hash of the originals; `receipts()` puts all of that beside every number. Pictures that cannot be read are skipped and
counted.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.items import Source
from vistok.data.sources import Where, open_source
from vistok.environment import environment
from vistok.errors import InputError, VistokError
from vistok.evaluation.distributions import Features, distances, feature_protocol
from vistok.evaluation.protocols import CROPS, ROUNDINGS, Protocol, find_protocol
from vistok.evaluation.receipt import VERSION, Receipt, plain
from vistok.layout import Size, TokenSpec
from vistok.losses.perceptual import Lpips, Perceptual
from vistok.metrics.clip_score import ClipScore, clip_score
from vistok.metrics.codes import CodebookUse, CodeStatistics
from vistok.metrics.extractors import Extractor
from vistok.metrics.iou import iou
from vistok.metrics.ms_ssim import SMALLEST, ms_ssim
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import ssim
from vistok.metrics.stream import Mean
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

FIELD_SIZE = 256  # what reconstruction is reported at
MOST_PREFIXES = 8
HALF = 128  # of 255, from which on a pixel belongs to a mask
BATCH_PIXELS = 8 * FIELD_SIZE**2


@dataclass(frozen=True)
class PrefixQuality:
    """Means over all pictures for one prefix length. `tokens` is a mean too where pictures differ in size.

    psnr: dB, with its deviation between pictures. ms_ssim: None where pictures are smaller than 161 pixels.
    bits_per_pixel: of the codes as packed in the token file, without its header. lpips and distances: where they were
    asked for, the distances by name (`vistok.evaluation.distributions`). iou: of masks. clip_score: of the pictures
    that have a caption, where it was asked for.
    """

    tokens: float
    bits_per_pixel: float
    psnr: float
    psnr_deviation: float
    ssim: float
    ms_ssim: float | None
    decode_images_per_second: float
    lpips: float | None = None
    distances: dict[str, float] = field(default_factory=dict)
    iou: float | None = None
    clip_score: float | None = None


@dataclass(frozen=True)
class Reconstruction:
    """The result of `evaluate`; `plain()` is its JSON."""

    model: str
    weights: str
    data: str
    images: int
    skipped: dict[str, str]
    protocol: dict[str, str]
    prefixes: list[PrefixQuality]
    codebooks: list[CodebookUse] = field(default_factory=list)
    encode_images_per_second: float = 0.0
    images_per_second: float = 0.0
    reference: str = ""  # the first 16 hexadecimal digits of a SHA-256 of the originals as they are compared
    features: dict[str, dict[str, Any]] = field(default_factory=dict)  # of every distance, its variant and extractor
    originals: dict[str, float] = field(default_factory=dict)  # what the originals score: the CLIP score
    settings: dict[str, Any] = field(default_factory=dict)

    def receipts(self) -> list[Receipt]:
        """Every value with all that decided it."""
        shared: dict[str, Any] = {key: self.protocol[key] for key in ("name", "crop", "resize", "rounding")}
        shared |= {"samples": self.images, "reference": self.reference}
        ran, found = environment(), []
        for row in self.prefixes:
            values = {"psnr": row.psnr, "ssim": row.ssim, "ms_ssim": row.ms_ssim, "lpips": row.lpips, "iou": row.iou}
            values |= {"clip_score": row.clip_score, **row.distances}
            for metric, value in values.items():
                if value is not None:
                    own = self.features.get(metric, {"variant": self.protocol.get(metric, "")})
                    found.append(
                        Receipt(
                            metric,
                            value,
                            shared | own,
                            {"name": self.model, "weights": self.weights},
                            self.settings | {"tokens": row.tokens},
                            environment=ran,
                        )
                    )
        return found

    def plain(self) -> dict[str, Any]:
        """All fields as JSON values, and the receipts."""
        return asdict(self) | {"receipts_version": VERSION, "receipts": plain(self.receipts())}


def evaluate(
    tokenizer: Tokenizer,
    data: Source | Where,
    *,
    size: int | None = None,
    length: int | None = None,
    protocol: str | Protocol = "vistok",
    extractor: Extractor | None = None,
    metrics: Sequence[str] = ("fid",),
    lpips: Perceptual | None = None,
    clip: ClipScore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Encode and decode every picture of `data`, at every prefix length or at `length` tokens alone.

    size: side of the crop; 0 takes pictures whole; None is 256, or the model's own size where 256 is not legal.
    protocol: how pictures are cut and rounded, by name (`vistok.evaluation.protocols`).
    extractor, metrics: distances between the features of originals and reconstructions, by name, where one is given.
    lpips: a perceptual distance of `vistok.losses.perceptual`, whose mean is reported.
    clip: scores pictures against their captions, those without one left out.
    progress: called with the pictures done and those skipped.
    Raises InputError for an illegal size or length, where no picture can be read, or has a caption that `clip` needs.
    """
    source, rules = open_source(data), find_protocol(protocol)
    if clip is not None and not source.captioned:
        raise InputError(
            f"{source.name} has no captions, which a CLIP score needs: put NAME.txt beside each picture, or a "
            'captions.jsonl of {"file_name": .., "text": ..} lines into the folder'
        )
    side = _default_size(tokenizer) if size is None else size
    run = _Run(tokenizer, length, rules, extractor, metrics, lpips, clip)
    skipped: dict[str, str] = {}
    resized = done = 0
    for batch in _batches(source, side, rules, skipped):
        if not done:
            run.warm_up(batch.pixels[:1])
        run.add(batch.pixels, batch.captions)
        done, resized = done + len(batch.pixels), resized + batch.resized
        if progress is not None:
            progress(done + len(skipped), len(skipped))
    if not done:
        told = f": {next(iter(skipped.values()))}" if skipped else ""
        raise InputError(f"not one of the {len(source)} pictures of {source.name} can be read{told}")
    return Reconstruction(
        model=tokenizer.name,
        weights=tokenizer.fingerprint,
        data=source.name,
        images=done,
        skipped=skipped,
        protocol=_protocol(rules, side, resized, done, lpips),
        prefixes=run.rows(),
        codebooks=run.codes.rows() if run.discrete else [],
        encode_images_per_second=done / run.encode_seconds,
        images_per_second=done / (run.encode_seconds + run.decode_seconds[-1]),
        reference=run.reference.hexdigest()[:16],
        features=run.features(),
        originals={} if run.captioned.mean is None else {"clip_score": run.captioned.mean},
        settings={"dtype": str(tokenizer.dtype).removeprefix("torch."), "device": tokenizer.device.type},
    )


def prefix_lengths(spec: TokenSpec, most: int = MOST_PREFIXES) -> list[int]:
    """The prefix lengths to show: all that decode, or where there are many, halves of halves up from the shortest.

    The number of them does not depend on the size of the picture.
    """
    prefixes = spec.prefixes
    if spec.prefix_rule != "any":
        return list(prefixes)[-most:]
    last = len(prefixes)
    return [prefixes[ceil(last / 2**power) - 1] for power in range(min(most - 1, (last - 1).bit_length()), -1, -1)]


# -- inside ------------------------------------------------------------------------------------------------------------


class _Run:
    """Sums over the batches so far."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        length: int | None,
        rules: Protocol,
        extractor: Extractor | None,
        metrics: Sequence[str],
        lpips: Perceptual | None,
        clip: ClipScore | None,
    ) -> None:
        self.tokenizer, self.length, self.rules, self.lpips, self.clip = tokenizer, length, rules, lpips, clip
        self.reference, self.words, self.captioned = sha256(), sha256(), Mean()
        self.real = None if extractor is None else Features(extractor, metrics)
        self.rebuilt: list[Features] = []
        self.codes, self.discrete = CodeStatistics(), False
        self.means: list[dict[str, Mean]] = []
        self.decode_seconds: list[float] = []
        self.encode_seconds = 0.0
        self.count = 0

    def warm_up(self, pixels: Tensor) -> None:
        """One picture through the model: the first call pays for what later ones find ready."""
        self._decode(self._encode(pixels[:, : self.tokenizer.input_channels]))

    def add(self, pixels: Tensor, captions: Sequence[str | None]) -> None:
        """Measure uint8 (B, 3, H, W); of masks the first channel."""
        pixels = pixels[:, : self.tokenizer.input_channels]
        with self._clock() as clock:
            tokens = self._encode(pixels)
        self.encode_seconds += clock[0]
        self.count += len(pixels)
        self.codes.update(tokens)
        self.discrete |= tokens.codes is not None
        lengths = self._lengths(tokens)
        original = self.rules.original(pixels)
        self.reference.update(str(tuple(original.shape)).encode() + original.contiguous().numpy().tobytes())
        if self.real is not None:
            self.real.update(original)
        texts = self._texts(original, captions)
        while len(self.means) < len(lengths):
            names = ("tokens", "bits", "psnr", "ssim", "ms_ssim", "lpips", "iou", "clip_score")
            self.means.append({name: Mean() for name in names})
            self.decode_seconds.append(0.0)
            if self.real is not None:
                self.rebuilt.append(Features(self.real.extractor, self.real.metrics))
        for row, prefix in enumerate(lengths):
            shorter = tokens if prefix == tokens.length else tokens.prefix(prefix)
            with self._clock() as clock:
                decoded = self._decode(shorter)
            self.decode_seconds[row] += clock[0]
            rebuilt = self.rules.eight_bit(decoded.cpu())
            self._measure(self.means[row], original, rebuilt, shorter)
            if self.clip is not None and texts is not None:
                found = self.clip.pictures(rebuilt[texts[0]])
                self.means[row]["clip_score"].update(clip_score(found, texts[1], self.clip.variant))
            if self.real is not None:
                self.rebuilt[row].update(rebuilt)

    def _measure(self, means: dict[str, Mean], pixels: Tensor, rebuilt: Tensor, tokens: Tokens) -> None:
        if rebuilt.shape != pixels.shape:
            raise InputError(
                f"{self.tokenizer.name} decodes {tuple(pixels.shape[1:])} to {tuple(rebuilt.shape[1:])}, which cannot "
                "be compared pixel by pixel"
            )
        means["tokens"].update(tokens.lengths)
        means["bits"].update(tokens.bits() / prod(pixels.shape[2:]))
        means["psnr"].update(psnr(rebuilt, pixels))
        if self.tokenizer.spec.output.modality == "mask":
            means["iou"].update(iou(rebuilt >= HALF, pixels >= HALF))
        means["ssim"].update(ssim(rebuilt, pixels, self.rules.ssim))
        if min(pixels.shape[2:]) >= SMALLEST:
            means["ms_ssim"].update(ms_ssim(rebuilt, pixels))
        if self.lpips is not None:
            with torch.no_grad():
                means["lpips"].update(self.lpips(rebuilt.float() / 255, pixels.float() / 255))

    def _texts(self, original: Tensor, captions: Sequence[str | None]) -> tuple[list[int], Tensor] | None:
        """Which pictures have captions, and the embeddings of these; the originals' own score is counted on the way."""
        there = [place for place, caption in enumerate(captions) if caption]
        if self.clip is None or not there:
            return None
        kept = [str(captions[place]) for place in there]
        for caption in kept:
            self.words.update(caption.encode() + b"\n")
        texts = self.clip.texts(kept)
        self.captioned.update(clip_score(self.clip.pictures(original[there]), texts, self.clip.variant))
        return there, texts

    def features(self) -> dict[str, dict[str, Any]]:
        """Of every metric that looks at features, its variant and its network."""
        real = self.real
        found: dict[str, dict[str, Any]] = (
            {} if real is None else {name: dict(feature_protocol(name, real.extractor)) for name in real.metrics}
        )
        if self.clip is not None and self.captioned.count:
            told = {"samples": self.captioned.count, "captions": self.words.hexdigest()[:16]}
            found["clip_score"] = self.clip.protocol | told
        return found

    def rows(self) -> list[PrefixQuality]:
        """One row per prefix length, shortest first."""
        found = []
        for index, (means, seconds) in enumerate(zip(self.means, self.decode_seconds, strict=True)):
            value = {name: mean.mean for name, mean in means.items()}
            assert value["psnr"] is not None
            found.append(
                PrefixQuality(
                    tokens=value["tokens"] or 0.0,
                    bits_per_pixel=value["bits"] or 0.0,
                    psnr=value["psnr"],
                    psnr_deviation=means["psnr"].deviation or 0.0,
                    ssim=value["ssim"] or 0.0,
                    ms_ssim=value["ms_ssim"],
                    decode_images_per_second=self.count / seconds,
                    lpips=value["lpips"],
                    iou=value["iou"],
                    clip_score=value["clip_score"],
                    distances={} if self.real is None else distances(self.rebuilt[index], self.real),
                )
            )
        return found

    def _encode(self, pixels: Tensor) -> Tokens:
        size: Size = (pixels.shape[2], pixels.shape[3])
        return self.tokenizer.encode(pixels, on_size=fitting(self.tokenizer.spec, size))

    def _decode(self, tokens: Tokens) -> Tensor:
        """uint8 where the protocol rounds as `decode` does, float otherwise."""
        return self.tokenizer.decode(tokens, dtype=torch.uint8 if self.rules.rounding == "nearest" else torch.float32)

    def _lengths(self, tokens: Tokens) -> list[int]:
        if self.length is None:
            canvas = tokens.canvas[0]
            return prefix_lengths(self.tokenizer.spec.of(canvas))
        if self.length > tokens.length:
            raise InputError(f"{self.tokenizer.name} makes {tokens.length} tokens here, fewer than {self.length}")
        return [self.length]

    @contextmanager
    def _clock(self) -> Iterator[list[float]]:
        spent = [0.0]
        started = time.perf_counter()
        yield spent
        if self.tokenizer.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize()
        spent[0] = time.perf_counter() - started


def fitting(spec: TokenSpec, size: Size) -> Any:
    """What to do with a size for a faithful comparison: pad it, or tile it where it is too large to pad."""
    return "pad" if spec.sizes.padded(size) is not None else "tile"


@dataclass(frozen=True)
class _Batch:
    pixels: Tensor
    resized: int
    captions: list[str | None]


def _batches(source: Source, side: int, rules: Protocol, skipped: dict[str, str]) -> Iterator[_Batch]:
    """Consecutive pictures of one size; what cannot be read goes to `skipped`."""
    pending: list[np.ndarray] = []
    captions: list[str | None] = []
    resized = 0
    for item in source:
        try:
            image = item.image
        except VistokError as error:
            skipped[item.id] = str(error)
            continue
        cut = rules.cut(image, side)
        most = max(1, BATCH_PIXELS // (cut.shape[0] * cut.shape[1]))
        if pending and (cut.shape != pending[0].shape or len(pending) >= most):
            yield _stack(pending, resized, captions)
            pending, captions, resized = [], [], 0
        pending.append(cut)
        captions.append(item.caption)
        resized += bool(side) and (rules.crop != "centre" or min(image.size) < side)
    if pending:
        yield _stack(pending, resized, captions)


def _stack(crops: list[np.ndarray], resized: int, captions: list[str | None]) -> _Batch:
    return _Batch(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous(), resized, captions)


def _default_size(tokenizer: Tokenizer) -> int:
    legal = tokenizer.spec.sizes.legal((FIELD_SIZE, FIELD_SIZE))
    return FIELD_SIZE if legal else min(tokenizer.spec.size)


def _protocol(rules: Protocol, side: int, resized: int, images: int, lpips: Perceptual | None) -> dict[str, str]:
    if side and rules.crop == "centre":
        crop = f"centre crop of {side} x {side} pixels"
        scaled = f"{resized} of {images} smaller pictures scaled up first, shorter side to {side}, bicubic (Pillow)"
        told_resize = scaled if resized else "none"
    elif side:
        crop, told_resize = f"centre crop of {side} x {side} pixels", CROPS[rules.crop][1]
    else:
        crop, told_resize = "none: whole pictures", "none"
    found = {
        "name": rules.name,
        "crop": crop,
        "resize": told_resize,
        "rounding": ROUNDINGS[rules.rounding][1],
        "psnr": "per picture over all channels, peak 255; then the mean",
        "ssim": rules.ssim,
        "ms_ssim": "wang-2003",
        "bits": "codes as packed in the token file, headers not counted",
    }
    if lpips is None:
        return found
    return found | {"lpips": f"{lpips.net} v0.1" if isinstance(lpips, Lpips) else type(lpips).__name__}
