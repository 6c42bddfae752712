"""Representation losses: codes that must predict the features of a frozen vision model, and such models.

    pixels (B, 3, H, W) in [0, 1] --teacher--> one feature an image (B, W)
    contrastive: each image's prediction should be closer to its own feature than to those of the others of its batch

Teachers come from the `transformers` package (`pip install vistok[models]`); "gradients" is a descriptor without
weights for experiments without a download. Source: FQGAN (arXiv:2411.16681, section 3.3).
"""

from collections.abc import Sequence
from math import ceil, isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, MismatchError, MissingExtraError, UnknownNameError, VistokError, nearest
from vistok.keys import KeyTable, State
from vistok.losses.frozen import Frozen
from vistok.nn.vit import ViT, ViTConfig, recognise_vit, vit_rules

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# name -> repository on the Hugging Face Hub, mean and deviation of its input
TRANSFORMERS = {
    "clip-l14": ("openai/clip-vit-large-patch14", CLIP),
    "clip-b16": ("openai/clip-vit-base-patch16", CLIP),
    "dinov2-s14": ("facebook/dinov2-small", IMAGENET),
    "dinov2-b14": ("facebook/dinov2-base", IMAGENET),
    "dinov2-l14": ("facebook/dinov2-large", IMAGENET),
}
TEACHERS = (*TRANSFORMERS, "gradients")


def contrastive(predicted: Tensor, target: Tensor) -> Tensor:
    """-mean log softmax of each prediction's cosine to its own target among those of the batch, both (B, W).

    Temperature 1, one direction, no gradient into `target`.
    """
    similarity = F.normalize(predicted, dim=-1) @ F.normalize(target.detach(), dim=-1).T
    return -similarity.log_softmax(1).diagonal().mean()


def teacher_input(
    pixels: Tensor, mean_deviation: tuple[Sequence[float], Sequence[float]] = CLIP, size: int = 224
) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] as a teacher sees them: resized to `size` by nearest neighbour, standardised."""
    mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in mean_deviation)
    return (F.interpolate(pixels, size=(size, size), mode="nearest") - mean) / deviation


class VisionTeacher(nn.Module):
    """The class token of a frozen ViT of the `transformers` package, (B, W), of pixels in [0, 1].

    Raises MissingExtraError without that package, VistokError where its weights cannot be had.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        repo, self.standard = TRANSFORMERS[name]
        try:
            from transformers import AutoModel, CLIPVisionModel
        except ImportError as error:
            raise MissingExtraError(f"the teacher {name} needs transformers: pip install vistok[models]") from error
        try:
            loader = CLIPVisionModel if name.startswith("clip") else AutoModel
            self.model = loader.from_pretrained(repo).eval().requires_grad_(False)
        except OSError as error:
            raise VistokError(
                f"cannot get the teacher {repo} from the Hugging Face Hub: {(str(error).splitlines() or [''])[0]}; "
                "'gradients' is a teacher that needs no download"
            ) from error

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self._tokens(pixels)[:, 0]

    @torch.no_grad()
    def patches(self, pixels: Tensor) -> Tensor:
        """Features of the patches, (B, rows, columns, W), a square grid."""
        patches = self._tokens(pixels)[:, 1:]
        return patches.unflatten(1, (isqrt(patches.shape[1]), -1))

    def _tokens(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=teacher_input(pixels, self.standard)).last_hidden_state


class ViTTeacher(Frozen):
    """The class token (B, W) of a DINO or DINOv2 ViT of one's own file, of pixels (B, 3, S, S) in [0, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.vit = ViT(config)
        mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)
        self.freeze()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.vit((pixels - self.mean) / self.deviation)[:, 0]

    @classmethod
    def from_state(cls, state: State, prefix: str = "", *, heads: int | None = None) -> "ViTTeacher":
        """From a state dict in timm's names after `prefix`, such as the `semantic_model.` of RobustTok's checkpoints.

        Heads are 64 numbers wide unless given. Raises MismatchError where there is no such ViT.
        """
        config = recognise_vit(state, prefix, heads=heads)
        if config is None:
            raise MismatchError(f"no ViT in these weights under {prefix or 'their own names'!r}, in timm's names")
        teacher = cls(config)
        theirs = {key: value for key, value in state.items() if key.startswith(prefix)}
        ours = KeyTable(*vit_rules(prefix, "vit.")).to_ours(theirs)
        teacher.load_weights(ours | {"mean": teacher.mean, "deviation": teacher.deviation})
        return teacher


class GradientHistogram(nn.Module):
    """What is where and which way it runs, without learned weights: W numbers of each image.

    Cells of a 4 x 4 grid each give the mean colour and a histogram of gradient directions, weighted by their strength
    (as HOG, Dalal and Triggs 2005); a fixed random rotation mixes them into `width` numbers.
    """

    projection: Tensor

    def __init__(self, width: int, cells: int = 4, directions: int = 8) -> None:
        super().__init__()
        self.cells, self.directions = cells, directions
        inner = cells * cells * (directions + 3)
        if width < 1:
            raise ConfigError(f"a teacher's width is at least 1, got {width}")
        draws = [
            torch.linalg.qr(torch.randn(inner, inner, generator=torch.Generator().manual_seed(block)))[0]
            for block in range(ceil(width / inner))
        ]
        self.register_buffer("projection", torch.cat(draws, 1)[:, :width], persistent=False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.float()
        grey = pixels.mean(1, keepdim=True)
        right = F.pad(grey[..., :, 1:] - grey[..., :, :-1], (0, 1))
        down = F.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
        angle = torch.atan2(down, right) / torch.pi  # in -1..1
        centres = torch.arange(self.directions, device=pixels.device) * 2 / self.directions - 1
        away = (angle - centres[:, None, None]).abs()
        near = (1 - torch.minimum(away, 2 - away) * self.directions / 2).clamp(min=0)
        maps = torch.cat([pixels - 0.5, 4 * near * (right.square() + down.square()).sqrt()], 1)
        described = F.adaptive_avg_pool2d(maps, self.cells).flatten(1)
        return described @ self.projection


def load_teacher(name: str, width: int) -> nn.Module:
    """The teacher `name`, which gives (B, `width`). Raises UnknownNameError, and what `VisionTeacher` raises."""
    if name == "gradients":
        return GradientHistogram(width)
    if name not in TRANSFORMERS:
        raise UnknownNameError(f"no teacher {name!r}{nearest(name, TEACHERS) or '; known: ' + ', '.join(TEACHERS)}")
    return VisionTeacher(name)
