"""How well a tokenizer rebuilds clips, at every prefix length: what `vistok eval` prints for a folder of them.

    clip ── windows ──> encode_windows ──> Tokens ── prefix(k), decode_windows ──> windows ──> PSNR, SSIM per frame
                                             |                                    \\──> 16 frames each ──> FVD
                                             \\──> bits per pixel, frame and second, codebook usage, frames/s

One window of frames is in memory at a time; clips are read once for their tokens and once more for every comparison.
Clips that cannot be read to their end are skipped and counted. Quality is a mean over frames: long clips weigh more.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.clips import ClipItem, check_takes_clips
from vistok.data.items import Item, Source
from vistok.data.sources import Where, open_source
from vistok.environment import environment
from vistok.errors import FormatError, InputError
from vistok.evaluation.protocols import evaluation_crop
from vistok.evaluation.receipt import VERSION, Receipt, plain
from vistok.evaluation.reconstruction import fitting, prefix_lengths
from vistok.metrics.codes import CodebookUse, CodeStatistics
from vistok.metrics.frechet import frechet_distance
from vistok.metrics.fvd import ClipFeatures, VideoExtractor
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import DEFAULT, ssim
from vistok.metrics.stream import Mean
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

if TYPE_CHECKING:
    from PIL import Image

Cut = Callable[["Image.Image"], np.ndarray] | None


@dataclass(frozen=True)
class ClipQuality:
    """Means for one prefix length. `tokens` and bits are sums over all clips, divided by frames, pixels or seconds.

    psnr: dB, over frames, with its deviation between frames; `psnr_worst` is the worst frame's. bits: of the codes as
    packed in the token file, without its header. fvd: where it was asked for.
    """

    share: float  # of the tokens
    tokens_per_frame: float
    bits_per_pixel: float
    bits_per_frame: float
    bits_per_second: float
    psnr: float
    psnr_deviation: float
    psnr_worst: float
    ssim: float
    decode_frames_per_second: float
    fvd: float | None = None


@dataclass(frozen=True)
class ClipReconstruction:
    """The result of `evaluate_clips`; `plain()` is its JSON."""

    model: str
    weights: str
    data: str
    clips: int
    frames: int
    seconds: float
    skipped: dict[str, str]
    protocol: dict[str, str]
    prefixes: list[ClipQuality]
    codebooks: list[CodebookUse] = field(default_factory=list)
    encode_frames_per_second: float = 0.0
    reference: str = ""  # the first 16 hexadecimal digits of a SHA-256 of the originals as they are compared
    features: dict[str, dict[str, Any]] = field(default_factory=dict)  # of FVD, its variant, extractor and clips
    settings: dict[str, Any] = field(default_factory=dict)

    def receipts(self) -> list[Receipt]:
        """Every value with all that decided it; `tokens` are those of a frame, `samples` frames or, of FVD, clips."""
        shared: dict[str, Any] = {key: self.protocol[key] for key in ("crop", "windows", "rounding")}
        shared |= {"samples": self.frames, "reference": self.reference}
        ran, found = environment(), []
        for row in self.prefixes:
            for metric, value in {"psnr": row.psnr, "ssim": row.ssim, "fvd": row.fvd}.items():
                if value is not None:
                    own = self.features.get(metric, {"variant": self.protocol.get(metric, "")})
                    model = {"name": self.model, "weights": self.weights}
                    settings = self.settings | {"tokens": row.tokens_per_frame}
                    found.append(Receipt(metric, value, shared | own, model, settings, environment=ran))
        return found

    def plain(self) -> dict[str, Any]:
        """All fields as JSON values, and the receipts."""
        return asdict(self) | {"receipts_version": VERSION, "receipts": plain(self.receipts())}


def evaluate_clips(
    tokenizer: Tokenizer,
    data: Source | Where,
    *,
    size: int | None = None,
    length: int | None = None,
    fvd: VideoExtractor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ClipReconstruction:
    """Encode and decode every clip of `data`, at every prefix length or at `length` tokens alone.

    size: side of each frame's centre crop (smaller frames are scaled up to it); None or 0 takes frames whole.
    fvd: the network of a Frechet video distance, which is then taken over every 16 consecutive frames.
    progress: called with the clips done and those skipped.
    Raises InputError for a tokenizer of pictures, an illegal length, where no clip can be read, or there are too few of
    16 frames for an FVD.
    """
    source = open_source(data)
    check_takes_clips(tokenizer, source.name)
    run = _Run(tokenizer, length, partial(evaluation_crop, size=size) if size else None, fvd)
    skipped: dict[str, str] = {}
    for place, item in enumerate(source):
        try:
            tokens = run.encode(item)
        except (FormatError, InputError) as error:
            skipped[item.id] = str(error)
        else:
            run.measure(item, tokens)
        if progress is not None:
            progress(place + 1, len(skipped))
    if not run.clips:
        told = f": {next(iter(skipped.values()))}" if skipped else ""
        raise InputError(f"not one of the {len(source)} clips of {source.name} can be read{told}")
    return ClipReconstruction(
        model=tokenizer.name,
        weights=tokenizer.fingerprint,
        data=source.name,
        clips=run.clips,
        frames=run.frames,
        seconds=run.seconds,
        skipped=skipped,
        protocol={
            "crop": f"centre crop of {size} x {size} pixels of each frame" if size else "none: whole frames",
            "windows": f"{tokenizer.spec.window} frames, each encoded alone",
            "rounding": "decoded pixels rounded to 8 bits",
            "psnr": "per frame over all channels, peak 255; then the mean over frames",
            "ssim": DEFAULT,
            "bits": "codes as packed in the token file, headers not counted",
        },
        prefixes=run.rows(),
        codebooks=run.codes.rows() if run.discrete else [],
        encode_frames_per_second=run.frames / run.encode_seconds,
        reference=run.reference.hexdigest()[:16],
        features={}
        if run.real is None
        else {"fvd": run.real.extractor.protocol | {"samples": run.real.count, "frames": run.real.frames}},
        settings={"dtype": str(tokenizer.dtype).removeprefix("torch."), "device": tokenizer.device.type},
    )


class _Run:
    """Sums over the clips so far."""

    def __init__(self, tokenizer: Tokenizer, length: int | None, cut: Cut, fvd: VideoExtractor | None) -> None:
        self.tokenizer, self.length, self.cut = tokenizer, length, cut
        self.reference = sha256()
        self.real = None if fvd is None else ClipFeatures(fvd)
        self.codes, self.discrete = CodeStatistics(), False
        self.clips = self.frames = self.pixels = self.tokens = 0
        self.seconds = self.encode_seconds = 0.0
        self.sums: list[_Sums] = []

    def encode(self, item: Item) -> Tokens:
        """The clip's tokens. What is not readable to its end leaves no trace in the sums."""
        if not isinstance(item, ClipItem):
            raise InputError(f"{item.id} is a picture, where clips are wanted")
        clip, reading = item.clip, _Clock()
        windows = reading.over(clip.windows(self.tokenizer.spec.window, self.cut))
        first = next(windows)
        if not self.clips:  # the first call pays for what later ones find ready
            self.tokenizer.decode(self._encode([first], None), dtype=torch.uint8)
        reading.seconds = 0.0
        began = time.perf_counter()
        tokens = self._encode(chain([first], windows), clip.rate)
        self._synchronise()
        self.encode_seconds += time.perf_counter() - began - reading.seconds
        return tokens

    def measure(self, item: ClipItem | Item, tokens: Tokens) -> None:
        """Count the codes, decode every prefix and compare it with the clip."""
        assert isinstance(item, ClipItem)
        canvas = tokens.canvas[0]
        assert canvas.frames is not None
        clip = item.clip
        self.clips, self.frames = self.clips + 1, self.frames + canvas.frames
        self.seconds += canvas.frames / clip.rate
        self.pixels += canvas.frames * prod(canvas.size)
        self.tokens += tokens.length
        self.codes.update(tokens)
        self.discrete |= tokens.codes is not None
        lengths = prefix_lengths(self.tokenizer.spec.of(canvas))
        if self.length is not None:
            lengths = [self.tokenizer.spec.of(canvas).check_prefix(self.length)]
        while len(self.sums) < len(lengths):
            self.sums.append(_Sums(None if self.real is None else ClipFeatures(self.real.extractor)))
        for place, (sums, prefix) in enumerate(zip(self.sums, lengths, strict=True)):
            shorter = tokens if prefix == tokens.length else tokens.prefix(prefix)
            sums.tokens += prefix
            sums.bits += int(shorter.bits()[0])
            with closing(sums.decoding.over(self._decoded(shorter))) as windows:
                for rebuilt, original in zip(windows, clip.windows(self.tokenizer.spec.window, self.cut), strict=True):
                    sums.compare(rebuilt.cpu(), original, self.tokenizer.name)
                    if not place:
                        self._count(original)
            for features in (sums.features, None if place else self.real):
                if features is not None:
                    features.end()

    def _count(self, original: Tensor) -> None:
        """Originals as they are compared, once, whatever the number of prefixes."""
        self.reference.update(str(tuple(original.shape)).encode() + original.contiguous().numpy().tobytes())
        if self.real is not None:
            self.real.update(original)

    def rows(self) -> list[ClipQuality]:
        """One row per prefix length, shortest first."""
        real = None if self.real is None else self.real.gaussian()
        return [
            ClipQuality(
                share=sums.tokens / self.tokens,
                tokens_per_frame=sums.tokens / self.frames,
                bits_per_pixel=sums.bits / self.pixels,
                bits_per_frame=sums.bits / self.frames,
                bits_per_second=sums.bits / self.seconds,
                psnr=sums.psnr.mean or 0.0,
                psnr_deviation=sums.psnr.deviation or 0.0,
                psnr_worst=sums.worst,
                ssim=sums.ssim.mean or 0.0,
                decode_frames_per_second=self.frames / sums.decoding.seconds,
                fvd=None if real is None or sums.features is None else frechet_distance(sums.features.gaussian(), real),
            )
            for sums in self.sums
        ]

    def _encode(self, windows: Iterable[Tensor], rate: float | None) -> Tokens:
        windows = iter(windows)
        first = next(windows)
        on_size = fitting(self.tokenizer.spec, (first.shape[-2], first.shape[-1]))
        return self.tokenizer.encode_windows(chain([first], windows), rate=rate, on_size=on_size)

    def _decoded(self, tokens: Tokens) -> Iterator[Tensor]:
        for window in self.tokenizer.decode_windows(tokens, dtype=torch.uint8):
            self._synchronise()
            yield window

    def _synchronise(self) -> None:
        if self.tokenizer.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize()


class _Sums:
    """Of one prefix length."""

    def __init__(self, features: ClipFeatures | None) -> None:
        self.tokens, self.bits, self.worst, self.features = 0, 0, float("inf"), features
        self.psnr, self.ssim, self.decoding = Mean(), Mean(), _Clock()

    def compare(self, rebuilt: Tensor, original: Tensor, name: str) -> None:
        """Frames (1, 3, t, H, W) of both."""
        if rebuilt.shape != original.shape:
            raise InputError(
                f"{name} decodes {tuple(original.shape[1:])} to {tuple(rebuilt.shape[1:])}, which cannot be compared "
                "pixel by pixel"
            )
        ours, theirs = rebuilt[0].transpose(0, 1), original[0].transpose(0, 1)
        values = psnr(ours, theirs)
        self.psnr.update(values)
        self.worst = min(self.worst, float(values.min()))
        self.ssim.update(ssim(ours, theirs))
        if self.features is not None:
            self.features.update(rebuilt)


class _Clock:
    """Seconds spent in making the values of iterators."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, values: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        """The same values, the time of making each counted."""
        while True:
            began = time.perf_counter()
            value = next(values, None)
            self.seconds += time.perf_counter() - began
            if value is None:
                return
            yield value
