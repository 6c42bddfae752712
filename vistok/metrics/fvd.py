"""The Frechet video distance: between clips, in the features of I3D (arXiv:1812.01717).

    clips uint8 (B, 3, 16, H, W) --224 x 224, [-1, 1]--> I3D --mean over time--> logits (B, 400) -> Moments -> distance

| extractor | frames to 224 x 224 | of |
| --- | --- | --- |
| i3d:stylegan-v | torch's bilinear, whatever the aspect | StyleGAN-V and those who use its script as it is |
| i3d:videogpt | shorter side, torch's bilinear, then the middle square | VideoGPT, TATS, the MAGVIT line, SEED-Voken |
| i3d:tensorflow | TensorFlow's bilinear, whatever the aspect | the authors' script |

Of square frames the first two are the same. All take weights in the layout of the PyTorch ports, keys such as
`Mixed_3b.b0.conv3d.weight`: `rgb_imagenet.pt` (the weights released with I3D) or `i3d_pretrained_400.pt` (those of
TensorFlow Hub, which published FVDs use; the two differ). StyleGAN-V's TorchScript archive is a program, and is not
read; it and the port differ by up to 10 %. A receipt names the weights by their hash.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from vistok.errors import InputError, UnknownNameError, nearest
from vistok.losses.weights import Source, read_weights
from vistok.metrics.extractors import fill, network_hash
from vistok.metrics.frechet import frechet_distance
from vistok.metrics.moments import Gaussian, Moments
from vistok.metrics.resize import RESIZES
from vistok.nn.i3d import FEATURES, FRAMES, I3D, SIDE

BATCH = 8  # clips that go through the network together


@dataclass(frozen=True)
class Way:
    """How frames reach the network's size: the resize's name, and whether only the middle square is seen."""

    resize: str
    crop: bool = False


VIDEO_EXTRACTORS = {
    "i3d:stylegan-v": Way("torch"),
    "i3d:videogpt": Way("torch", crop=True),
    "i3d:tensorflow": Way("tensorflow"),
}
DEFAULT = "i3d:stylegan-v"


class VideoExtractor:
    """A frozen I3D with its way of taking clips; see the module's docstring.

    name      as it is reported
    features  names of what it gives, the first being what distances are taken of
    hash      the first 12 hexadecimal digits of a SHA-256 of its weights
    """

    features = tuple(FEATURES)

    def __init__(self, name: str, network: I3D, way: Way, side: int = SIDE) -> None:
        self.name, self.network, self.way, self.side = name, network.eval().requires_grad_(False), way, side
        self.hash = network_hash(network)

    @property
    def protocol(self) -> dict[str, Any]:
        """What a result has to say of its features."""
        return {
            "variant": self.name,
            "extractor": self.name,
            "extractor weights": self.hash,
            "extractor resize": f"{self.way.resize}, " + ("shorter side" if self.way.crop else "both sides"),
            "extractor crop": "middle square" if self.way.crop else "none",
            "extractor side": self.side,
        }

    def to(self, device: torch.device | str) -> "VideoExtractor":
        """Move the network. Returns itself."""
        self.network.to(device)
        return self

    def sized(self, clips: Tensor) -> Tensor:
        """uint8 (B, 3, T, H, W) to float (B, 3, T, side, side) in [-1, 1]. Raises InputError for other clips."""
        if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[1] != 3:
            raise InputError(f"clips {clips.dtype} {tuple(clips.shape)}; {self.name} takes uint8 (B, 3, T, H, W)")
        frames = clips.transpose(1, 2).flatten(0, 1).to(next(self.network.parameters()).device)
        height, width = frames.shape[2:]
        size = (self.side, self.side)
        if self.way.crop:
            shorter = min(height, width)
            size = (ceil(height * self.side / shorter), ceil(width * self.side / shorter))
        frames = RESIZES[self.way.resize](frames, size)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        frames = frames[:, :, top : top + self.side, left : left + self.side]
        return (frames / 127.5 - 1).unflatten(0, (len(clips), clips.shape[2])).transpose(1, 2)

    @torch.no_grad()
    def __call__(self, clips: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Clips uint8 (B, 3, T, H, W) to the named features, float32 (B, W) each; the logits unless told.

        Raises InputError for clips of another kind, UnknownNameError for features that it does not give.
        """
        wanted = tuple(names) if names is not None else self.features[:1]
        for one in wanted:
            if one not in self.features:
                raise UnknownNameError(f"{self.name} gives no {one!r}{nearest(one, list(FEATURES))}; {list(FEATURES)}")
        return self.network(self.sized(clips), wanted)


def build_video_extractor(
    name: str = DEFAULT, weights: Source | Sequence[Source] | None = None, side: int = SIDE
) -> VideoExtractor:
    """An extractor by name, with weights of a safetensors or PyTorch file in the ports' layout.

    Raises UnknownNameError for another name, InputError without weights (none are downloaded), FormatError for damage,
    MismatchError where they do not fit.
    """
    if name not in VIDEO_EXTRACTORS:
        known = nearest(name, list(VIDEO_EXTRACTORS)) or f"; there are {', '.join(VIDEO_EXTRACTORS)}"
        raise UnknownNameError(f"no extractor of clips {name!r}{known}")
    if weights is None:
        raise InputError(
            f"{name} needs the weights of an I3D trained on Kinetics-400, a file of your own: rgb_imagenet.pt or "
            "i3d_pretrained_400.pt, or safetensors of the same keys"
        )
    network = I3D()
    fill(network, read_weights(weights, f"the extractor {name}"), name)
    return VideoExtractor(name, network, VIDEO_EXTRACTORS[name], side)


class ClipFeatures:
    """Mean and covariance of the features of clips that arrive window by window, cut into `frames` frames each.

    Frames at a clip's end that fill none are left out; `count` says how many clips there were.
    """

    def __init__(self, extractor: VideoExtractor, frames: int = FRAMES) -> None:
        if frames < 1:
            raise InputError(f"{frames} frames a clip; expected at least 1")
        self.extractor, self.frames, self._moments = extractor, frames, Moments()
        self._open: Tensor | None = None  # (1, 3, t, H, W), t below `frames`
        self._waiting: list[Tensor] = []

    def update(self, window: Tensor) -> None:
        """Add consecutive frames of one clip, uint8 (1, 3, t, H, W)."""
        held = window if self._open is None else torch.cat([self._open, window], 2)
        whole = held.shape[2] // self.frames * self.frames
        for clip in held[:, :, :whole].split(self.frames, 2):
            if clip.shape[2]:
                self._waiting.append(self.extractor.sized(clip))
        self._open = held[:, :, whole:] if held.shape[2] > whole else None
        if len(self._waiting) >= BATCH:
            self._flush()

    def end(self) -> None:
        """What comes next belongs to another clip."""
        self._open = None

    @property
    def count(self) -> int:
        """Clips of `frames` frames seen."""
        return self._moments.count + len(self._waiting)

    def gaussian(self) -> Gaussian:
        """Raises InputError for fewer than two clips."""
        self._flush()
        if self._moments.count < 2:
            raise InputError(
                f"{self._moments.count} clips of {self.frames} frames; a Frechet video distance needs at least two, "
                "and some thousands to mean much"
            )
        return self._moments.gaussian()

    @torch.no_grad()
    def _flush(self) -> None:
        if self._waiting:
            found = self.extractor.network(torch.cat(self._waiting), self.extractor.features[:1])
            self._moments.update(found[self.extractor.features[0]].float().cpu())
            self._waiting = []


def fvd(first: Tensor, second: Tensor, extractor: VideoExtractor) -> float:
    """The distance of two sets of clips, uint8 (N, 3, T, H, W) each. Raises InputError for fewer than two of either."""
    if first.ndim != 5 or second.ndim != 5 or first.shape[2] != second.shape[2]:
        raise InputError(f"clips {tuple(first.shape)} and {tuple(second.shape)}; expected (N, 3, T, H, W), T the same")
    features = [
        torch.cat([extractor(part)[extractor.features[0]].cpu() for part in clips.split(BATCH)])
        for clips in (first, second)
    ]
    return frechet_distance(features[0], features[1])
