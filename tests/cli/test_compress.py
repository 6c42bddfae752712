"""compress and decompress: round trips of files, what is refused before a model is loaded, and damage."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import vistok
from tests import layered  # noqa: F401
from tests.cli.test_main import run
from vistok import catalogue, loading
from vistok.cli import decompress
from vistok.pixels import from_pil


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    vistok.create("layered").save(folder)
    return str(folder)


@pytest.fixture
def photo(tmp_path) -> str:
    """20 wide and 40 high once it is turned upright."""
    values = np.random.RandomState(0).randint(0, 256, (20, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "photo.png", exif=exif)
    return str(tmp_path / "photo.png")


def test_there_and_back(photo, model, tmp_path, capsys):
    file, back = str(tmp_path / "a.vtc"), tmp_path / "back.png"
    code, out, _ = run(capsys, "compress", photo, "-o", file, "-m", model, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["size"] == [40, 20]
    assert told["bytes"] == (tmp_path / "a.vtc").stat().st_size
    assert told["bpp"] == 8 * told["bytes"] / 800
    for _ in range(2):  # an output of decompress may be replaced
        code, out, _ = run(capsys, "decompress", file, "-o", str(back), "-m", model, "--json")
        assert code == 0
        assert json.loads(out)["size"] == [40, 20]
    tok = vistok.load(model)
    wanted = tok.decode(tok.encode(Image.open(photo))).mul(255).round()
    assert np.array_equal(from_pil(Image.open(back)).numpy(), wanted.numpy())
    code, _, _ = run(capsys, "compress", photo, "-o", file, "-m", model, "--length", "15", "--overwrite")
    assert code == 0
    assert (tmp_path / "a.vtc").stat().st_size < told["bytes"]


def test_budgets_and_lengths_that_cannot_be(photo, model, tmp_path, capsys):
    file = tmp_path / "a.vtc"
    for words, told in ((["--bpp", "0.01"], "the shortest file of layered takes"), (["--length", "7"], "nearest")):
        code, _, err = run(capsys, "compress", photo, "-o", str(file), "-m", model, *words)
        assert code == 1
        assert told in err
        assert not file.exists()


def test_damage_is_one_line_and_writes_nothing(photo, model, tmp_path, capsys):
    file = tmp_path / "a.vtc"
    run(capsys, "compress", photo, "-o", str(file), "-m", model)
    data = file.read_bytes()
    damaged = {
        "empty": b"",
        "cut short": data[:-3],
        "followed by 2 other bytes": data + b"ab",
        "damaged": data[:-8] + bytes([data[-8] ^ 16]) + data[-7:],
        "upgrade": data[:1] + bytes([data[1] + 4]) + data[2:],
        "not a compressed file": b"\x89PNG",
    }
    for told, content in damaged.items():
        file.write_bytes(content)
        code, out, err = run(capsys, "decompress", str(file), "-o", str(tmp_path / "b.png"), "-m", model)
        assert (code, out) == (1, "")
        assert told in err
        assert err.count("\n") == 1
        assert not (tmp_path / "b.png").exists()


def test_another_model_and_a_size_above_the_limit_are_refused(photo, model, tmp_path, capsys, monkeypatch):
    file = str(tmp_path / "a.vtc")
    run(capsys, "compress", photo, "-o", file, "-m", model)
    vistok.create("layered-other").save(tmp_path / "other")
    code, _, err = run(capsys, "decompress", file, "-o", str(tmp_path / "b.png"), "-m", str(tmp_path / "other"))
    assert code == 1
    assert "pass the model that wrote it" in err
    monkeypatch.setenv("VISTOK_MAX_PIXELS", "100")
    code, _, err = run(capsys, "decompress", file, "-o", str(tmp_path / "b.png"), "-m", model)
    assert code == 1
    assert "20x40, above the limit of 100 pixels" in err


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


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("embedded")
    vistok.create("vistok-progressive-tiny").save(folder)
    return str(folder)


def test_targets(photo, embedded, tmp_path, capsys):
    file = tmp_path / "a.vtk"
    for words in (["--bytes", "60"], ["--bpp", "0.6"]):
        code, _, _ = run(capsys, "compress", photo, "-o", str(file), "-m", embedded, *words, "--overwrite")
        assert code == 0
        assert 50 <= file.stat().st_size <= 60
    code, _, _ = run(capsys, "compress", photo, "-o", str(file), "-m", embedded, "--psnr", "9", "--overwrite")
    assert code == 0
    code, _, err = run(capsys, "compress", photo, "-o", str(tmp_path / "b"), "-m", embedded, "--psnr", "99")
    assert code == 1
    assert "reaches" in err
    code, _, err = run(capsys, "compress", photo, "-o", str(file), "-m", embedded, "--psnr", "9", "--bytes", "60")
    assert code == 1
    assert "--bytes or --psnr, not both" in err


def test_the_beginning_of_a_file_from_a_pipe(photo, embedded, tmp_path, capsys, monkeypatch):
    file, back = tmp_path / "a.vtk", tmp_path / "back.png"
    run(capsys, "compress", photo, "-o", str(file), "-m", embedded)
    beginning = file.read_bytes()[:100]
    for partial, status in ((False, 1), (True, 0)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(beginning)))
        words = ["--partial", "--json"] if partial else []
        code, out, err = run(capsys, "decompress", "-", "-o", str(back), "-m", embedded, *words)
        assert code == status
        assert back.exists() == partial
        assert "--partial" in err or json.loads(out)["whole"] is False
    assert Image.open(back).size == (20, 40)


def test_the_model_is_found_from_the_file(photo, embedded, tmp_path, capsys, monkeypatch):
    """Of two models that ship, the one whose weights wrote it; of none, the error names both sides."""
    variants = []
    for name, model in (("first", vistok.create("vistok-progressive-tiny")), ("second", vistok.load(embedded))):
        model.save(tmp_path / "weights" / name)
        weights = (catalogue.WeightFile(package=name),)
        variants.append(catalogue.Variant(name, "vistok-progressive", "tokenizer", weights=weights))
    file, back = tmp_path / "a.vtk", tmp_path / "back.png"
    run(capsys, "compress", photo, "-o", str(file), "-m", embedded)
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "weights")
    monkeypatch.setattr(catalogue, "variants", lambda: iter(variants))
    code, out, _ = run(capsys, "decompress", str(file), "-o", str(back), "--json")
    assert code == 0
    assert json.loads(out)["whole"] is True
    assert Image.open(back).size == (20, 40)
    monkeypatch.setattr(catalogue, "variants", lambda: iter(variants[:1]))
    monkeypatch.setattr(decompress, "DEFAULT_COMPRESSOR", "first")
    code, _, err = run(capsys, "decompress", str(file), "-o", str(back))
    assert code == 1
    assert "pass the model that wrote it" in err
