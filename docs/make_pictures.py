"""Draw docs/pictures/reconstructions.webp: `python docs/make_pictures.py`.

Originals above, then what the tokenizer that ships rebuilds from ever longer prefixes, with bits per pixel. The
pictures are scikit-image's bundled ones.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import vistok
from vistok.data.images import read_image
from vistok.pixels import to_pil

PAGE = Path(__file__).resolve().parent / "pictures" / "reconstructions.webp"
PICTURES = {"astronaut.png": (64, 0), "coffee.png": (140, 20), "chelsea.png": (60, 0), "rocket.jpg": (190, 60)}
SIDE, GAP, LEFT = 256, 6, 92


def crop(name: str, left: int, top: int) -> Image.Image:
    """A square of a bundled picture, brought to 256 pixels."""
    import skimage

    image = read_image(Path(skimage.__file__).parent / "data" / name)
    side = min(image.width - left, image.height - top, 384 if min(image.size) > 400 else 290)
    return image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    tok = vistok.load()
    images = [crop(name, *place) for name, place in PICTURES.items()]
    tokens = tok.encode(images)
    prefixes = tok.spec.prefixes
    shown = [prefixes[0], prefixes[1], prefixes[len(prefixes) // 2], prefixes[-1]]
    rows = [("original", "", images)]
    for length in shown:
        part = tokens.prefix(length)
        told = f"{int(part.bits()[0]) / SIDE**2:.3f} bit/px"
        rows.append((f"{length} tokens", told, [to_pil(pixels) for pixels in tok.decode(part)]))
    sheet = Image.new("RGB", (LEFT + len(images) * (SIDE + GAP), len(rows) * (SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, (name, told, pictures) in enumerate(rows):
        top = row * (SIDE + GAP)
        draw.text((4, top + SIDE // 2 - 18), name, "black", font)
        draw.text((4, top + SIDE // 2 + 2), told, "gray", font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (LEFT + column * (SIDE + GAP), top))
    PAGE.parent.mkdir(exist_ok=True)
    sheet.save(PAGE, quality=88, method=6)
    print(f"{PAGE.name}: {sheet.size}, {PAGE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
