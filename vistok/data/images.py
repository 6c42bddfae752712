"""Image files in and out: whatever a camera, a scraper or a paint program left behind, as RGB with 8 bits a channel.

    bytes --header: format, size--> open_image --decode, turn upright, to RGB--> read_image

The header is checked before anything is decoded, so that a decompression bomb (a few kilobytes that unfold into
gigabytes) costs nothing. The limit is `max_pixels`, or the environment's VISTOK_MAX_PIXELS, or 200 megapixels.
"""

import io
import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok.errors import FormatError, InputError, OutputError
from vistok.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MAX_PIXELS = 200_000_000
MAX_PIXELS_VARIABLE = "VISTOK_MAX_PIXELS"

# Pillow's names. Formats that run other programs (EPS) or hold pictures within pictures (ICO, ICNS) stay out.
FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jp2": "JPEG2000",
    ".j2k": "JPEG2000",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
}
IMAGE_SUFFIXES = tuple(FORMATS)
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")  # here, where no torch is needed
_READABLE = (*dict.fromkeys(FORMATS.values()), "DIB")
_opening = threading.Lock()  # Pillow's own pixel limit is one global: it is ours only while a header is read


def is_image_name(name: str | os.PathLike) -> bool:
    """Whether a file's name ends like an image's and is not hidden (as the `._` files of macOS archives are)."""
    path = Path(name)
    return path.suffix.lower() in FORMATS and not path.name.startswith(".")


def is_video_name(name: str | os.PathLike) -> bool:
    """Whether a file's name ends like a clip's and is not hidden (an animated GIF is a picture, of its first frame)."""
    path = Path(name)
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def pixel_limit(max_pixels: int | None = None) -> int:
    """The limit in force: the argument, else the environment's, else the default. Raises InputError for nonsense."""
    if max_pixels is None:
        text = os.environ.get(MAX_PIXELS_VARIABLE, "")
        if not text:
            return MAX_PIXELS
        try:
            max_pixels = int(text.replace("_", ""))
        except ValueError:
            raise InputError(f"{MAX_PIXELS_VARIABLE}={text!r}; expected a number of pixels, like 500000000") from None
    if max_pixels < 1:
        raise InputError(f"a limit of {max_pixels} pixels; expected at least 1")
    return max_pixels


def open_image(
    source: str | os.PathLike | bytes, *, max_pixels: int | None = None, name: str | None = None
) -> "Image.Image":
    """Read the header alone: a PIL image whose `size` is known and whose pixels are not decoded yet.

    `name` is what messages call the picture (the path by default). Raises InputError for a file that is not there or
    more than `max_pixels` pixels, FormatError for what is empty, not an image, or damaged in its header.
    """
    from PIL import Image, UnidentifiedImageError

    limit = pixel_limit(max_pixels)
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else _read_bytes(Path(source), name)
    if not data:
        raise FormatError(f"{name} is empty (0 bytes)")
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            allowed, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit
            try:
                image = Image.open(io.BytesIO(data), formats=_READABLE)
            finally:
                Image.MAX_IMAGE_PIXELS = allowed
    except UnidentifiedImageError:
        raise FormatError(f"{name} is not an image that can be read here, or its beginning is damaged") from None
    except Image.DecompressionBombError:
        raise _too_large(name, "more than twice the limit", limit) from None
    except Exception as error:  # decoders of damaged files raise whatever their parsing runs into
        raise FormatError(f"{name} has a damaged header ({_told(error)})") from error
    if image.width * image.height > limit:
        raise _too_large(name, f"{image.width}x{image.height} pixels", limit)
    return image


def decode_image(image: "Image.Image", name: str = "the picture") -> "Image.Image":
    """Decode what `open_image` gave: first frame, upright by EXIF, RGB, 8 bits a channel, transparency over white.

    Raises FormatError when the picture is cut short or damaged.
    """
    from vistok.upright import upright_rgb

    try:
        image.load()
        return upright_rgb(image)
    except MemoryError as error:
        raise InputError(f"{name} has {image.width}x{image.height} pixels, more than memory holds") from error
    except Exception as error:  # as above
        raise FormatError(f"{name} is cut short or damaged ({_told(error)})") from error


def read_image(
    source: str | os.PathLike | bytes, *, max_pixels: int | None = None, name: str | None = None
) -> "Image.Image":
    """A picture, from a path or a file's bytes, as an upright 8-bit RGB PIL image; see `open_image` for errors."""
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    return decode_image(open_image(source, max_pixels=max_pixels, name=name), name)


def write_image(path: str | os.PathLike, pixels: "Tensor | Image.Image", **options: Any) -> None:
    """Write one picture at once or not at all, in the format that the name ends with.

    `pixels`: (C, H, W) or (1, C, H, W), float in [0, 1] or uint8, or a PIL image. `options` go to Pillow (`quality`).
    Raises InputError for an ending that names no image format, OutputError when it cannot be written.
    """
    from PIL import Image

    from vistok.pixels import to_pil

    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: no image format ends in {path.suffix!r}; expected one of {' '.join(FORMATS)}")
    image = pixels if isinstance(pixels, Image.Image) else to_pil(pixels)
    if kind in ("JPEG", "WEBP", "AVIF"):
        options.setdefault("quality", 95)
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=kind, **options)
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"cannot write {path} as {kind}: {_told(error)}") from error
    write_atomically(path, buffer.getvalue())


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder; expected an image file") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error


def _too_large(name: str, size: str, limit: int) -> InputError:
    return InputError(
        f"{name} has {size}, above the limit of {limit:,} that guards against decompression bombs; "
        f"if you trust it, raise the limit with {MAX_PIXELS_VARIABLE} or max_pixels"
    )


def _told(error: Exception) -> str:
    """The error in one line, the same at every run: Pillow puts addresses of objects into some messages."""
    text = str(error).split(" <_io")[0].split("\n")[0].strip()
    return text or type(error).__name__
