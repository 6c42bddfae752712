"""Every kind of picture that folders hold, made on the spot."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.images import (
    IMAGE_SUFFIXES,
    MAX_PIXELS_VARIABLE,
    is_image_name,
    open_image,
    pixel_limit,
    read_image,
    write_image,
)
from vistok.errors import FormatError, InputError, OutputError


def scene(width=24, height=16):
    """A picture whose corners tell how it is turned."""
    array = np.random.RandomState(0).randint(0, 60, (height, width, 3)).astype(np.uint8)
    array[: height // 2, : width // 2, 0] = 250
    return Image.fromarray(array)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that promises `width` x `height` pixels and holds a handful of bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".webp"])
def test_lossless_formats_give_the_pixels_back(tmp_path, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    write_image(tmp_path / f"a{suffix}", scene(), **options)
    assert np.array_equal(np.array(read_image(tmp_path / f"a{suffix}")), np.array(scene()))


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".avif", ".gif", ".jp2"])
def test_lossy_formats_are_written_and_read(tmp_path, suffix):
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    try:
        write_image(tmp_path / f"a{suffix}", flat)
    except OutputError:
        pytest.skip(f"this Pillow was built without {suffix}")
    assert np.abs(np.array(read_image(tmp_path / f"a{suffix}")).astype(int) - np.array(flat)).max() <= 6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tensors_are_written(tmp_path, dtype):
    pixels = torch.arange(3 * 4 * 5).reshape(1, 3, 4, 5)
    write_image(tmp_path / "deep" / "a.png", pixels.to(torch.uint8) if dtype == torch.uint8 else pixels / 255.0)
    assert np.array_equal(np.array(read_image(tmp_path / "deep" / "a.png")), pixels[0].permute(1, 2, 0).numpy())


def test_sixteen_bits_are_scaled_down_not_clipped():
    array = np.array([[0, 32768, 65535]], dtype=np.uint16)
    assert np.array(read_image(encoded(Image.fromarray(array))))[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_palette_grey_and_bilevel_become_rgb():
    cmyk = read_image(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"))
    assert cmyk.mode == "RGB"
    assert cmyk.getpixel((0, 0)) == (255, 0, 0)
    palette = read_image(encoded(scene().quantize(16)))
    assert palette.mode == "RGB"
    assert read_image(encoded(Image.new("L", (2, 2), 7))).getpixel((0, 0)) == (7, 7, 7)
    assert read_image(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_transparency_lies_over_white():
    assert read_image(encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0)))).getpixel((0, 0)) == (255, 255, 255)
    keyed = encoded(Image.new("P", (2, 2), 0), transparency=0)
    assert read_image(keyed).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_applied(orientation):
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored so that turning it right by 90 degrees makes it upright
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(scene().transpose(turn), "PNG", exif=exif)
    assert np.array_equal(np.array(read_image(stored)), np.array(scene()))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert read_image(data).getpixel((3, 3)) == (255, 0, 0)


def test_one_pixel():
    assert read_image(encoded(Image.new("RGB", (1, 1), "red"))).size == (1, 1)


def test_a_hundred_megapixels_are_read_without_a_warning():
    data = encoded(Image.new("L", (12_500, 8_000), 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(data)
    assert image.size == (12_500, 8_000)
    assert image.getpixel((12_499, 7_999)) == (9, 9, 9)


@pytest.mark.parametrize("side", [15_000, 60_000])
def test_bombs_are_refused_from_the_header(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"bomb\.png has .*decompression bombs"):
            open_image(path)


def test_the_limit_can_be_moved(monkeypatch):
    data = encoded(scene(40, 30))
    with pytest.raises(InputError, match=r"40x30 pixels, above the limit of 1,000"):
        open_image(data, max_pixels=1_000)
    assert open_image(png_header(20_000, 20_000), max_pixels=400_000_000).size == (20_000, 20_000)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "1_199")
    with pytest.raises(InputError, match=MAX_PIXELS_VARIABLE):
        read_image(data)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "many")
    with pytest.raises(InputError, match="expected a number of pixels"):
        pixel_limit()


def test_pillows_own_limit_is_left_as_it_was():
    before = Image.MAX_IMAGE_PIXELS
    open_image(encoded(scene()))
    with pytest.raises(InputError):
        open_image(png_header(60_000, 60_000))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore:Tag data")
def test_cut_and_damaged_files_raise_format_errors_alone(tmp_path, kind):
    data = encoded(scene(64, 48), kind)
    rng = np.random.RandomState(1)
    for cut in (1, 5, 20, len(data) // 2):
        path = tmp_path / "cut.img"
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"cut\.img"):
            read_image(path)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.randint(0, len(data), 6):
            broken[place] = rng.randint(256)
        with contextlib.suppress(FormatError, InputError):  # a flipped bit may go unnoticed, or claim a huge size
            read_image(bytes(broken))


def test_messages_do_not_hold_addresses(tmp_path):
    data = encoded(scene(), "JPEG")
    told = []
    for _ in range(2):
        with pytest.raises(FormatError) as caught:
            read_image(data[: len(data) // 2], name="x.jpg")
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert " at 0x" not in told[0]


def test_what_is_no_image(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(FormatError, match=r"empty\.jpg is empty"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(FormatError, match=r"text\.jpg is not an image"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(InputError, match="does not exist"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)


def test_programs_are_not_run():
    with pytest.raises(FormatError):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_write_refuses_unknown_endings_and_full_folders(tmp_path):
    with pytest.raises(InputError, match=r"ends in '\.xyz'"):
        write_image(tmp_path / "a.xyz", scene())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_image(tmp_path / "file" / "a.png", scene())


def test_names():
    assert is_image_name("a/b/C.JPG")
    assert not is_image_name("a/._b.jpg")
    assert not is_image_name("notes.txt")
    assert ".webp" in IMAGE_SUFFIXES
