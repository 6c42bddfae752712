"""Pictures in, pixels out: checked conversion to (B, 3, H, W), and fitting to the sizes that a model takes.

Clips are (B, 3, T, H, W). They are cut into windows of as many frames as the model takes, as pictures are into tiles.

Accepted: a PIL image, a uint8 array or tensor (0..255), a float tensor in [0, 1], or a list of these. Anything else
is refused, never guessed: a float tensor that leaves [0, 1] is far more often a normalised one than a bright one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.errors import InputError
from vistok.layout import Canvas, Clips, Size, Sizes
from vistok.upright import upright_rgb

if TYPE_CHECKING:
    from PIL import Image

OnSize = Literal["pad", "refuse", "resize", "tile"]


def to_pixels(image: "Image.Image | np.ndarray | Tensor", channels: int = 3) -> Tensor:
    """One image or a batch of one size as (B, C, H, W): uint8 stays uint8, float is checked to be within [0, 1].

    Arrays are (H, W, C), (H, W) or (B, H, W, C) as Pillow and OpenCV give them; tensors (C, H, W) or (B, C, H, W), or
    (B, C, T, H, W) for clips, which stay that.
    """
    if isinstance(image, Tensor):
        pixels = image if image.ndim in (4, 5) else image[None]
        layout = "(B, C, H, W), (C, H, W) or, of clips, (B, C, T, H, W)"
    elif isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        array = array if array.ndim == 4 else array[None]
        if array.ndim != 4:
            raise InputError(f"an array of shape {image.shape}; expected (H, W, C) or (B, H, W, C)")
        pixels = torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)
        layout = "(H, W, C) or (B, H, W, C)"
    elif hasattr(image, "convert"):
        pixels = torch.from_numpy(np.array(image.convert("L")))[None, None] if channels == 1 else from_pil(image)
        layout = "a PIL image"
    else:
        raise InputError(f"cannot take {type(image).__name__}; expected a PIL image, a uint8 array, or a tensor")
    if channels == 1 and pixels.ndim in (4, 5) and pixels.shape[1] == 3:
        pixels = _mask_of(pixels)
    if pixels.ndim not in (4, 5) or pixels.shape[1] != channels or 0 in pixels.shape:
        raise InputError(
            f"pixels of shape {tuple(getattr(image, 'shape', pixels.shape))}; expected {layout}, C = {channels}"
        )
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise InputError(f"pixels of type {pixels.dtype}; expected uint8 in 0..255 or float in [0, 1]")
    low, high = (float(value) for value in pixels.aminmax())
    if not (low >= 0.0 and high <= 1.0):  # also true for NaN
        if low != low or high != high:
            raise InputError("pixels hold NaN; expected float in [0, 1]")
        hint = "divide by 255" if high > 2 else "map [-1, 1] to [0, 1] with (x + 1) / 2" if low < 0 else "clamp them"
        raise InputError(f"float pixels span [{low:.4g}, {high:.4g}]; expected [0, 1]: {hint}")
    return pixels


def _mask_of(pixels: Tensor) -> Tensor:
    """The one channel of masks (B, 3, H, W) that were read as pictures. Raises InputError where channels differ."""
    if not (torch.equal(pixels[:, 0], pixels[:, 1]) and torch.equal(pixels[:, 0], pixels[:, 2])):
        raise InputError(
            "a coloured picture, where this model takes masks in black and white; vistok.data.masks.read_index gives "
            "the masks of an index PNG one by one"
        )
    return pixels[:, :1]


def as_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0..255 to float [0, 1]; floats only change their dtype."""
    return pixels.to(dtype).div_(255) if pixels.dtype == torch.uint8 else pixels.to(dtype)


def as_uint8(pixels: Tensor) -> Tensor:
    """Float [0, 1] to uint8 0..255, rounded to nearest; uint8 passes."""
    return pixels if pixels.dtype == torch.uint8 else pixels.clamp(0, 1).mul(255).round_().to(torch.uint8)


def from_pil(image: "Image.Image") -> Tensor:
    """A PIL image of any mode as uint8 (1, 3, H, W): first frame, upright by EXIF, transparency over white."""
    return torch.from_numpy(np.array(upright_rgb(image))).permute(2, 0, 1)[None]


def to_pil(pixels: Tensor) -> "Image.Image":
    """One image, (C, H, W) or (1, C, H, W), float in [0, 1] or uint8, as a PIL image."""
    from PIL import Image

    pixels = pixels[0] if pixels.ndim == 4 else pixels
    array = as_uint8(pixels.detach()).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else np.ascontiguousarray(array))


# -- fitting to legal sizes ------------------------------------------------------------------------------------------


def plan(
    size: Size,
    sizes: Sizes,
    on_size: OnSize = "pad",
    *,
    frames: int | None = None,
    clips: Clips | None = None,
    rate: float | None = None,
) -> Canvas:
    """How a picture of `size`, or a clip of so many `frames`, is brought to what is legal.

    A clip is cut into windows; the last one is padded, and cut back in decoding. Models of pictures (`clips` None) get
    clips frame by frame. Raises InputError, with the ways out, when it cannot be.
    """
    if on_size not in ("pad", "refuse", "resize", "tile"):
        raise InputError(f"on_size={on_size!r}; expected 'pad', 'refuse', 'resize' or 'tile'")
    canvas = _plan_size(size, sizes, on_size)
    if frames is None:
        return canvas
    clips = clips or Clips()
    if on_size == "refuse" and not clips.legal(frames) and clips.maximum > 1:
        raise InputError(
            f"a clip of {frames} frames, where this model takes {clips.describe()}; on_size='pad' cuts it into windows "
            "and pads the last"
        )
    return replace(canvas, frames=frames, rate=rate, window=clips.window(frames))


def _plan_size(size: Size, sizes: Sizes, on_size: OnSize) -> Canvas:
    if sizes.legal(size):
        return Canvas(size)
    told = f"a picture of {size[0]}x{size[1]} (height x width), where this model takes {sizes.describe()}"
    if on_size == "refuse":
        raise InputError(f"{told}; on_size='pad', 'resize' or 'tile' would fit it")
    if on_size == "resize":
        return Canvas(size, resized=sizes.nearest(size))
    if on_size == "pad":
        padded = sizes.padded(size)
        if padded is None:
            raise InputError(f"{told}: it is too large to pad; use on_size='resize' or on_size='tile'")
        return Canvas(size, padding=(0, 0, padded[1] - size[1], padded[0] - size[0]))
    tile = sizes.tile(size)
    rows, columns = -(-size[0] // tile[0]), -(-size[1] // tile[1])
    return Canvas(size, padding=(0, 0, columns * tile[1] - size[1], rows * tile[0] - size[0]), tiles=(rows, columns))


def fit(pixels: Tensor, canvas: Canvas, *, blank: bool = False, clips: bool = False) -> Tensor:
    """Scale, pad and cut (B, C[, T], H, W) as planned; pieces become (B * windows * rows * columns, C[, t], h, w).

    Padding repeats the border and the last frame; with `blank`, for masks, the border is zero. Windows keep their time
    axis if the model takes `clips`, else they are the pictures (B, C, H, W) of single frames.
    """
    if canvas.resized:
        pixels = resize(pixels, canvas.resized)
    left, top, right, bottom = canvas.padding
    if any(canvas.padding):
        pad = (left, right, top, bottom)
        pixels = F.pad(pixels, pad) if blank else _repeat_border(pixels, left, top, right, bottom)
    if canvas.window is not None:
        pixels = _windows(pixels, canvas.windows, canvas.window)
        pixels = pixels if clips else pixels[:, :, 0]
    rows, columns = canvas.tiles
    if rows * columns == 1:
        return pixels
    tiles = pixels.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))  # (B, C[, T], rows, h, columns, w)
    return tiles.movedim((-4, -2), (1, 2)).flatten(0, 2)


def restore(pixels: Tensor, canvas: Canvas, scale: float = 1.0) -> Tensor:
    """Inverse of `fit` on decoded pixels, which may be `scale` times larger: pieces joined, padding cut, rescaled."""
    rows, columns = canvas.tiles
    if rows * columns > 1:
        tiles = pixels.unflatten(0, (-1, rows, columns)).movedim((1, 2), (-4, -2))
        pixels = tiles.flatten(-2).flatten(-3, -2)
    if canvas.window is not None:
        pixels = pixels[:, :, None] if pixels.ndim == 4 else pixels
        pixels = pixels.unflatten(0, (-1, canvas.windows)).transpose(1, 2).flatten(2, 3)[:, :, : canvas.frames]
    left, top, right, bottom = (round(side * scale) for side in canvas.padding)
    height, width = pixels.shape[-2:]
    pixels = pixels[..., top : height - bottom, left : width - right]
    if canvas.resized:
        pixels = resize(pixels, (round(canvas.size[0] * scale), round(canvas.size[1] * scale)))
    return pixels


def _windows(pixels: Tensor, count: int, window: int) -> Tensor:
    """Clips (B, C, T, H, W) to (B * count, C, window, H, W), the last frame repeated where they end early."""
    frames = pixels.shape[2]
    if frames != count * window:
        pixels = pixels.index_select(2, torch.arange(count * window, device=pixels.device).clamp_(max=frames - 1))
    return pixels.unflatten(2, (count, window)).transpose(1, 2).flatten(0, 1)


def resize(pixels: Tensor, size: Size) -> Tensor:
    """Antialiased bicubic resampling, clamped to the range of the input's type."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    if pixels.ndim == 5:
        frames = pixels.transpose(1, 2)
        return resize(frames.flatten(0, 1), size).unflatten(0, frames.shape[:2]).transpose(1, 2)
    scaled = F.interpolate(as_float(pixels), size=size, mode="bicubic", antialias=True, align_corners=False).clamp_(
        0, 1
    )
    return as_uint8(scaled) if pixels.dtype == torch.uint8 else scaled.to(pixels.dtype)


def _repeat_border(pixels: Tensor, left: int, top: int, right: int, bottom: int) -> Tensor:
    """Replicate padding that also works on uint8 and for borders wider than the picture."""
    height, width = pixels.shape[-2:]
    rows = torch.arange(-top, height + bottom, device=pixels.device).clamp_(0, height - 1)
    columns = torch.arange(-left, width + right, device=pixels.device).clamp_(0, width - 1)
    return pixels.index_select(-2, rows).index_select(-1, columns)


def group_by_canvas(
    images: Sequence[Any],
    sizes: Sizes,
    on_size: OnSize,
    *,
    clips: Clips | None = None,
    rate: float | None = None,
) -> dict[Canvas, list[int]]:
    """Indices of `images` (as `to_pixels` gives them) that share one canvas, in order of first appearance."""
    groups: dict[Canvas, list[int]] = {}
    for index, pixels in enumerate(images):
        frames = pixels.shape[2] if pixels.ndim == 5 else None
        canvas = plan(tuple(pixels.shape[-2:]), sizes, on_size, frames=frames, clips=clips, rate=rate)
        groups.setdefault(canvas, []).append(index)
    return groups


def tiled(pixels: Tensor, columns: int, border: int = 2) -> Tensor:
    """Pictures (n, C, H, W) in rows of `columns`, each with a white border right and below: (C, rows (H + border), ..).

    Places that are left over are white.
    """
    white = 255 if pixels.dtype == torch.uint8 else 1.0
    missing = -len(pixels) % columns
    if missing:
        pixels = torch.cat([pixels, torch.full_like(pixels[:1], white).expand(missing, -1, -1, -1)])
    rows = F.pad(pixels, (0, border, 0, border), value=white).unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
