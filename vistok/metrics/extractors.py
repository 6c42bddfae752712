"""Feature networks of the distribution metrics, each with its own way of taking pictures, by name.

    uint8 (B, 3, H, W) --resize--> side x side --scale--> network -> {feature's name: (B, W)}

| name | network | resize | metrics |
| --- | --- | --- | --- |
| inception:torch-fidelity | Inception 2015-12-05 | TensorFlow's bilinear | FID, IS, KID; 1d-tokenizer, torchmetrics |
| inception:pytorch-fid | the same weights | torch's bilinear | FID of SEED-Voken, TokenFlow and LlamaGen |
| inception:clean-fid | the same weights | Pillow's bicubic | clean-fid, mode "clean" |
| inception:adm | the same weights | TensorFlow's bilinear | FID, sFID, IS, precision and recall of the ADM suite |
| dinov2-s14, -b14, -l14 | DINOv2's class token | bicubic, 224 | FDD |
| clip-b16, clip-l14 | CLIP's image features | bicubic, 224 | FD_CLIP |

A distance belongs to its extractor: `protocol` says which it was, with a hash of its weights. Sources: the card of each
tool named; arXiv:1512.00567 (Inception), 2304.07193 (DINOv2), 2103.00020 (CLIP), 2306.04675 (FD in DINOv2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import InputError, MismatchError, UnknownNameError, nearest
from vistok.losses.representation import TRANSFORMERS, ViTTeacher
from vistok.losses.weights import Source, read_weights
from vistok.metrics.resize import resize
from vistok.nn.inception import FEATURES, SIDE, FIDInception

INCEPTION_WEIGHTS = "toshas/torch-fidelity:pt_inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Way:
    """How an extractor takes pictures: a resize's name, the side, then (pixel - mean) / deviation per channel."""

    resize: str
    side: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


_TENSORFLOW = Way("tensorflow", SIDE, (128.0,) * 3, (128.0,) * 3)
INCEPTIONS = {
    "inception:torch-fidelity": _TENSORFLOW,
    "inception:pytorch-fid": Way("torch", SIDE, (127.5,) * 3, (127.5,) * 3),
    "inception:clean-fid": Way("clean", SIDE, (128.0,) * 3, (128.0,) * 3),
    "inception:adm": _TENSORFLOW,
}
EXTRACTORS = (*INCEPTIONS, *TRANSFORMERS)


class Extractor:
    """A frozen feature network; see the module's docstring.

    name      as it is reported
    features  names of what it gives, the first being what distances are taken of
    hash      the first 12 hexadecimal digits of a SHA-256 of its weights
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        way: Way,
        forward: Callable[[Tensor, Sequence[str]], dict[str, Tensor]],
        features: Sequence[str] = ("features",),
    ) -> None:
        self.name, self.network, self.way, self.features = (
            name,
            network.eval().requires_grad_(False),
            way,
            tuple(features),
        )
        self._forward = forward
        self.hash = network_hash(network)

    @property
    def protocol(self) -> dict[str, Any]:
        """What a result has to say of its features."""
        return {"extractor": self.name, "weights": self.hash, "resize": self.way.resize, "side": self.way.side}

    def to(self, device: torch.device | str) -> "Extractor":
        """Move the network. Returns itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Pixels uint8 (B, 3, H, W) to the named features, float32 (B, W) each; the first one unless told.

        Raises InputError for pixels of another kind, UnknownNameError for features that it does not give.
        """
        wanted = tuple(names) if names is not None else self.features[:1]
        for one in wanted:
            if one not in self.features:
                raise UnknownNameError(
                    f"{self.name} gives no {one!r}{nearest(one, self.features)}; {list(self.features)}"
                )
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"pixels {pixels.dtype} {tuple(pixels.shape)}; extractors take uint8 (B, 3, H, W)")
        device = next(self.network.parameters()).device
        mean, deviation = (torch.tensor(v, device=device)[:, None, None] for v in (self.way.mean, self.way.deviation))
        sized = resize(pixels.to(device), (self.way.side, self.way.side), self.way.resize)
        return {name: value.float() for name, value in self._forward((sized - mean) / deviation, wanted).items()}


def build_extractor(name: str, weights: Source | Sequence[Source] | None = None) -> Extractor:
    """An extractor by name, with the published weights, or with those of a file of one's own in the published layout.

    Raises UnknownNameError for another name, VistokError where weights cannot be had, MismatchError where they do not
    fit the network.
    """
    if name in INCEPTIONS:
        network = FIDInception()
        fill(network, read_weights(weights or INCEPTION_WEIGHTS, f"the extractor {name}"), name)
        return Extractor(
            name, network, INCEPTIONS[name], network, ("2048", *(key for key in FEATURES if key != "2048"))
        )
    if name in TRANSFORMERS:
        return _vision(name, weights)
    raise UnknownNameError(f"no extractor {name!r}{nearest(name, EXTRACTORS) or f'; there are {list(EXTRACTORS)}'}")


def _vision(name: str, weights: Source | Sequence[Source] | None) -> Extractor:
    """A ViT's class token after the last norm; of CLIP the projected image features."""
    repo, (mean, deviation) = TRANSFORMERS[name]
    way = Way("bicubic", 224, tuple(255 * v for v in mean), tuple(255 * v for v in deviation))
    if name.startswith("dinov2") and weights is not None:
        teacher = ViTTeacher.from_state(read_weights(weights, f"the extractor {name}"))
        return Extractor(name, teacher, way, lambda x, names: {"features": teacher.vit(x)[:, 0]})
    from vistok.extras import import_extra

    transformers = import_extra("transformers", "models")
    loader = transformers.CLIPVisionModelWithProjection if name.startswith("clip") else transformers.AutoModel
    where = repo if weights is None else str(weights)
    try:
        model = loader.from_pretrained(where)
    except OSError as error:
        raise MismatchError(
            f"the extractor {name}: cannot load {where}: {(str(error).splitlines() or [''])[0]}; "
            "give weights=FOLDER of a model that transformers has saved"
        ) from error
    if name.startswith("clip"):
        return Extractor(name, model, way, lambda x, names: {"features": model(pixel_values=x).image_embeds})
    return Extractor(name, model, way, lambda x, names: {"features": model(pixel_values=x).last_hidden_state[:, 0]})


def fill(network: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Load published weights; counters of BatchNorm may be missing. Raises MismatchError where they do not fit."""
    ours = network.state_dict()
    wrong = [key for key, value in state.items() if key in ours and ours[key].shape != value.shape]
    if wrong:
        raise MismatchError(
            f"these weights are not the {name}'s: {wrong[0]} is {tuple(state[wrong[0]].shape)}, where "
            f"{tuple(ours[wrong[0]].shape)} is expected"
        )
    missing, extra = network.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or extra:
        raise MismatchError(
            f"these weights are not the {name}'s: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(extra)} are unknown ({', '.join(extra[:3])})"
        )


def network_hash(network: nn.Module) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of all its weights, by their names."""
    digest = sha256()
    for key, tensor in sorted(network.named_parameters()) + sorted(network.named_buffers()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
