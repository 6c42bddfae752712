"""What the reproductions of TokBench and VTBench share: photographs with a word on them, a reader, small autoencoders.

    photograph (3, 128, 128) --four random letters, 10 to 48 px high--> scene, box, height
    scene --autoencoder: the same CNN, and a bottleneck that is continuous, VQ or FSQ--> rebuilt scene
    box of either --RapidOCR--> four letters, or not

Words are random letters, so that no reader can guess them, in the font that comes with Pillow, so that they are the
same on every machine. Letters that the reader takes for one another (i, j, l, o, q, v) are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vistok.data.rendered_text import contrasting
from vistok.evaluation.readers import Reader
from vistok.evaluation.reproducing import Context
from vistok.layout import Segment, TokenSpec
from vistok.metrics.codes import CodeStatistics
from vistok.quantize import FSQ
from vistok.quantize.base import Quantized, Quantizer
from vistok.reproductions._small import fit, shared
from vistok.tokenizer import TokenData
from vistok.tokenizers.vq_vae import VQVAE, VQVAEConfig

SIDE, PATCH = 128, 64  # of a scene, and of what the autoencoders learn from
LETTERS, LENGTH = "abcdefghkmnprstuwxyz", 4
HEIGHTS = (10, 48)  # of the font in px
PHOTOGRAPHS, TEST_PHOTOGRAPHS, SCENES = 800, 100, 2400
AT_ONCE = 50


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 (3, S, S), with a word in `box` (left, top, right, bottom) in a font of `height` px."""

    pixels: Tensor
    word: str
    box: tuple[int, int, int, int]
    height: int


def scene(photograph: Tensor, rng: np.random.Generator, heights: tuple[int, int] = HEIGHTS) -> Scene:
    """A photograph, uint8 (3, S, S), with a word that `rng` chooses, in a colour that stands out from what is under it.

    `heights` of the font, from and below. A word that is too wide for the picture is drawn anew, in another height.
    """
    image = Image.fromarray(photograph.permute(1, 2, 0).contiguous().numpy())
    draw, side = ImageDraw.Draw(image), min(image.size)
    while True:
        word = "".join(rng.choice(list(LETTERS), LENGTH))
        height = int(rng.integers(*heights))
        font = ImageFont.load_default(height)
        left, top, right, bottom = (round(edge) for edge in draw.textbbox((0, 0), word, font=font))
        if max(right - left, bottom - top) + 4 < side:
            break
    x, y = (int(rng.integers(2, side - extent - 1)) for extent in (right - left, bottom - top))
    box = (x, y, x + right - left, y + bottom - top)
    draw.text((x - left, y - top), word, font=font, fill=contrasting(image, box, rng))
    return Scene(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), word, box, height)


def held_out_scenes(context: Context, count: int, heights: tuple[int, int] = HEIGHTS) -> list[Scene]:
    """`count` scenes on test photographs, the same for all arms and seeds."""
    photographs = context.test_pixels(SIDE, TEST_PHOTOGRAPHS)[0]
    return [
        scene(photographs[place % len(photographs)], np.random.default_rng([1, place]), heights)
        for place in range(count)
    ]


def training_scenes(context: Context) -> Tensor:
    """SCENES scenes on training photographs, uint8 (n, 3, 128, 128), made once for all arms and seeds."""

    def make() -> dict[str, Tensor]:
        photographs = context.train_pixels(SIDE, PHOTOGRAPHS)[0]
        found = [scene(photographs[n % len(photographs)], np.random.default_rng([0, n])).pixels for n in range(SCENES)]
        return {"pixels": torch.stack(found)}

    return shared(context, "scenes", make)["pixels"]


def read(reader: Reader, scenes: Sequence[Scene], pixels: Tensor) -> list[str]:
    """What stands in the scenes' boxes in `pixels`, uint8 (n, 3, S, S), with two pixels around."""
    crops = []
    for one, picture in zip(scenes, pixels, strict=True):
        left, top, right, bottom = one.box
        cut = picture[:, max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2]
        crops.append(np.ascontiguousarray(cut.permute(1, 2, 0).numpy()))
    return reader(crops)


# -- autoencoders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneConfig(VQVAEConfig):
    """A VQ-VAE whose bottleneck may be another one: `levels` of FSQ, or `code_dim` numbers as they are."""

    widths: tuple[int, ...] = (32, 64, 64)
    blocks: tuple[int, ...] = (0, 1, 1)
    code_dim: int = 16
    codebook_size: int = 1024
    resolution: int = SIDE
    bottleneck: Literal["continuous", "vq", "fsq"] = "vq"
    levels: tuple[int, ...] = (8, 5, 5, 5)


class Unrounded(Quantizer):
    """No quantizer: the latent as it is, or with `steps` values a dimension, at equal distances over 1.5 deviations."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, ())
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def _quantize(self, z: Tensor) -> Quantized:
        if self.training:
            for name, value in (("mean", z.mean((0, 1))), ("deviation", z.std((0, 1)))):
                getattr(self, name).lerp_(value.detach(), 0.05)
        return Quantized(z, None)

    def rounded(self, z: Tensor, steps: int = 4) -> Tensor:
        """Vectors (B, N, D) with log2(steps) bits a dimension."""
        half = (steps - 1) / 2
        places = ((z - self.mean) / self.deviation * (half / 1.5) + half).round().clamp(0, steps - 1)
        return (places - half) * (1.5 / half) * self.deviation + self.mean


class SceneTokenizer(VQVAE):
    """The VQ-VAE of this library with another bottleneck."""

    def __init__(self, config: SceneConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        if config.bottleneck == "vq":
            return
        rounds = config.bottleneck == "fsq"
        other: Quantizer = FSQ(config.levels, config.code_dim) if rounds else Unrounded(config.code_dim)
        self.quantizer = other  # type: ignore[assignment]
        codes, dim = (other.codebooks, None) if rounds else ((), config.code_dim)
        factor = config.factor
        self.spec = TokenSpec(
            size=self.spec.size,
            layout=lambda size: (Segment("grid", (size[0] // factor, size[1] // factor), codes, dim),),
            sizes=self.spec.sizes,
        )

    def tokenize(self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], **conditions: Any) -> TokenData:
        """Codes, or of the continuous one vectors."""
        if not isinstance(self.quantizer, Unrounded):
            return super().tokenize(pixels, spec, seeds=seeds, **conditions)
        return TokenData(vectors=self.encoder(self.prepare(pixels)).flatten(2).transpose(1, 2))


def trained(config: SceneConfig, seed: int, context: Context) -> SceneTokenizer:
    """An autoencoder that has learnt from squares of 64 px of the training scenes, within the budget."""
    scenes = training_scenes(context)
    torch.manual_seed(seed)
    tokenizer = SceneTokenizer(config, context.arm)
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = squares(scenes, context.batch, seed)
    fit(tokenizer, tokenizer.loss, data, context.steps, lr=2e-3, seed=seed, bf16=True, tell=context.tell)
    return tokenizer.requires_grad_(False)


def squares(pixels: Tensor, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches {"pixels"} without end: a square of PATCH px of each of `size` pictures, at a place that `seed` draws."""
    rng = np.random.default_rng(seed)
    most = pixels.shape[-1] - PATCH
    while True:
        rows, tops, lefts = (rng.integers(0, limit, size) for limit in (len(pixels), most + 1, most + 1))
        cut = [
            pixels[row, :, top : top + PATCH, left : left + PATCH]
            for row, top, left in zip(rows, tops, lefts, strict=True)
        ]
        yield {"pixels": torch.stack(cut).float() / 255}


def rebuilt(tokenizer: SceneTokenizer, pixels: Tensor) -> Tensor:
    """Pictures, uint8 (n, 3, S, S), through an autoencoder."""
    return torch.cat([tokenizer.decode(tokenizer.encode(part), dtype=torch.uint8) for part in pixels.split(AT_ONCE)])


def bits(tokenizer: SceneTokenizer, pixels: Tensor) -> float:
    """Bits that the tokens of one picture take."""
    return float(tokenizer.encode(pixels[:1]).bits()[0])


def usage(tokenizer: SceneTokenizer, pixels: Tensor) -> float:
    """Share of the codebook that pictures use; 1 where there is none."""
    if not tokenizer.quantizer.codebooks:
        return 1.0
    counted = CodeStatistics()
    for part in pixels.split(AT_ONCE):
        counted.update(tokenizer.encode(part))
    return counted.rows()[0].usage or 0.0
