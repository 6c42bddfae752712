"""Any picture that Pillow opens as upright RGB with 8 bits a channel. Without torch, for processes that only decode."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held


def upright_rgb(image: "Image.Image") -> "Image.Image":
    """RGB with 8 bits a channel: EXIF rotation applied, 16-bit scaled down, transparency laid over white."""
    from PIL import Image, ImageOps

    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode != "F" else max(float(array.max(initial=1.0)), 1.0)
        image = Image.fromarray(np.clip(np.rint(array * (255.0 / top)), 0, 255).astype(np.uint8))
    if image.getexif().get(ORIENTATION, 1) != 1:  # asked first, because exif_transpose copies every picture
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
