"""compress and decompress: what is refused before a model is loaded."""

import pytest
from PIL import Image

from tests.cli.test_main import run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16), "red").save(path)
    return str(path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--length", "3", "--bpp", "0.1"], "--length or --bpp, not both"),
        (["--bpp", "nan"], "expected a number above 0"),
        (["--bpp", "-1"], "expected a number above 0"),
        (["-m", "no-such-model"], "no-such-model"),
    ],
)
def test_compress_refuses_what_cannot_be_meant(words, told, picture, tmp_path, capsys):
    code, out, err = run(capsys, "compress", picture, "-o", str(tmp_path / "a.vtc"), *words)
    assert (code, out) == (1, "")
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.vtc").exists()


def test_compress_keeps_a_file_that_exists(picture, tmp_path, capsys):
    (tmp_path / "a.vtc").write_bytes(b"mine")
    code, _, err = run(capsys, "compress", picture, "-o", str(tmp_path / "a.vtc"))
    assert code == 1
    assert "--overwrite" in err
    assert (tmp_path / "a.vtc").read_bytes() == b"mine"


def test_compress_reads_the_picture_first(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, _, err = run(capsys, "compress", str(tmp_path / "bad.png"), "-o", str(tmp_path / "a.vtc"))
    assert code == 1
    assert "bad.png is not an image" in err


def test_decompress_refuses_a_name_without_a_format_and_a_file_that_is_not_there(picture, tmp_path, capsys):
    assert "no image format" in run(capsys, "decompress", "a.vtc", "-o", str(tmp_path / "a.xyz"))[2]
    assert "is the compressed file itself" in run(capsys, "decompress", picture, "-o", picture)[2]
    code, _, err = run(capsys, "decompress", str(tmp_path / "none.vtc"), "-o", str(tmp_path / "b.png"))
    assert code == 1
    assert "none.vtc: No such file" in err
