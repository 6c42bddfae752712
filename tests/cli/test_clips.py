"""Commands on clips: encode, decode, compress, decompress, eval, reconstruct; mistakes in one line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.cli.test_main import run
from tests.data.moving import assert_written, clips, cut_short
from tests.data.pictures import folder
from tests.data.test_store import contents
from vistok.data.video import read_clip
from vistok.nn.i3d import I3D


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "omni"
    vistok.create("omnitokenizer-tiny").save(path)
    return str(path)


@pytest.fixture(scope="module")
def pictures_model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "strata"
    vistok.create("strata-tiny").save(path)
    return str(path)


@pytest.fixture
def root(tmp_path):
    """Three clips, the middle one cut short."""
    folder = clips(tmp_path / "c", [7, 5, 3], rate=12.0)
    cut_short(folder / "01.mp4")
    return folder


def test_encode_and_decode(root, model, tmp_path, capsys):
    words = ["encode", str(root), "-o", str(tmp_path / "s"), "-m", model]
    code, out, err = run(capsys, *words, "--json", "--verify")
    facts = json.loads(out)
    assert code == 0, err
    assert (facts["rows"], facts["quarantined"], facts["verified"]["wrong"]) == (2, 1, [])
    before = contents(tmp_path / "s")
    code, _, err = run(capsys, *words)
    assert "1 unreadable" in err
    assert contents(tmp_path / "s") == before
    code, _, err = run(capsys, "decode", str(tmp_path / "s"), "-o", str(tmp_path / "out"), "-m", model)
    assert "2 clips written" in err
    for name, frames in (("00", 7), ("02", 3)):
        pixels, rate = read_clip(tmp_path / "out" / f"{name}.mp4")
        assert (pixels.shape, rate) == ((1, 3, frames, 32, 48), 12.0)
    one = ["encode", str(root / "00.mp4"), "-o", str(tmp_path / "one"), "-m", model, "--json"]
    assert json.loads(run(capsys, *one)[1])["rows"] == 1


def test_compress_and_decompress(root, model, tmp_path, capsys):
    file, back = str(tmp_path / "a.vtk"), str(tmp_path / "back.mp4")
    code, out, err = run(capsys, "compress", str(root / "00.mp4"), "-o", file, "-m", model, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["size"], told["frames"], told["rate"]) == ([32, 48], 7, 12.0)
    assert told["bpp"] == pytest.approx(8 * told["bytes"] / (7 * 32 * 48))
    code, out, err = run(capsys, "decompress", file, "-o", back, "-m", model, "--json")
    assert code == 0, err
    pixels, rate = read_clip(back)
    assert (pixels.shape, rate) == ((1, 3, 7, 32, 48), 12.0)
    tok = vistok.load(model)
    wanted = tok.decode(tok.encode(read_clip(root / "00.mp4")[0]), dtype=torch.uint8)
    assert_written(tmp_path / "wanted.mp4", pixels, wanted, 12.0)
    code, _, err = run(capsys, "decompress", file, "-o", str(tmp_path / "back.png"), "-m", model)
    assert (code, "holds a clip" in err) == (1, True)
    assert not (tmp_path / "back.png").exists()


def test_eval(root, model, capsys):
    code, out, err = run(capsys, "eval", "--data", str(root), "-m", model)
    assert code == 0, err
    assert "10 frames in 2 clips" in out
    assert "unreadable and skipped: 1" in err
    found = json.loads(run(capsys, "eval", "--data", str(root), "-m", model, "--json")[1])
    assert (found["clips"], found["frames"], list(found["skipped"])) == (2, 10, ["01.mp4"])
    row = found["prefixes"][0]
    assert row["bits_per_second"] == pytest.approx(12 * row["bits_per_frame"])
    assert row["bits_per_frame"] == pytest.approx(row["bits_per_pixel"] * 32 * 48)
    assert np.isfinite(row["psnr"])
    assert {book["segment"] for book in found["codebooks"]} == {"first", "rest"}


def test_eval_with_a_frechet_video_distance(model, tmp_path, capsys, monkeypatch):
    root = clips(tmp_path / "f", [16, 16], rate=12.0)
    save_file(I3D().state_dict(), tmp_path / "i3d.safetensors")
    # the network itself takes seconds a clip at the published side; its own tests run it
    monkeypatch.setattr(I3D, "forward", lambda self, x, names: {"logits": x[..., ::28, ::28].mean(2).flatten(1)})
    words = ["eval", "--data", str(root), "-m", model, "--metrics", "fvd"]
    code, out, err = run(capsys, *words, "--extractor", str(tmp_path / "i3d.safetensors"))
    assert code == 0, err
    assert "FVD" in out
    assert "i3d:stylegan-v" in out
    named = ["--extractor", "i3d:videogpt", "--weights", f"i3d={tmp_path / 'i3d.safetensors'}", "--json"]
    found = json.loads(run(capsys, *words, *named)[1])
    (receipt,) = [one for one in found["receipts"] if one["metric"] == "fvd"]
    assert receipt["protocol"]["variant"] == "i3d:videogpt"
    assert receipt["value"] == found["prefixes"][0]["fvd"] > 0
    for changed, told in [
        (words, "a file of your own"),
        ([*words[:-1], "fid"], "of clips there are"),
        ([*words, "--extractor", "i3d:best"], "no extractor of clips"),
        ([*words, "--extractor", str(tmp_path / "gone.pt")], "gone.pt"),
        ([*words, "--protocol", "adm"], "--protocol is for pictures"),
    ]:
        code, printed, err = run(capsys, *changed)
        assert (code, printed) == (1, "")
        assert told in err
        assert err.count("\n") == 1


def test_reconstruct_takes_a_folder_of_clips(root, model, tmp_path, capsys):
    code, _, err = run(capsys, "reconstruct", str(root), "-o", str(tmp_path / "out"), "-m", model)
    assert code == 1  # the middle one
    assert "01.mp4" in err
    assert read_clip(tmp_path / "out" / "00.mp4")[0].shape[2] == 7


def test_a_tokenizer_of_pictures_says_what_to_do(root, pictures_model, tmp_path, capsys):
    clip, out = str(root / "00.mp4"), str(tmp_path / "out")
    for words in (
        ["encode", str(root), "-o", out, "-m", pictures_model],
        ["compress", clip, "-o", out, "-m", pictures_model],
        ["eval", "--data", str(root), "-m", pictures_model],
    ):
        code, printed, err = run(capsys, *words)
        assert (code, printed, err.count("\n")) == (1, "", 1)
        assert "needs a tokenizer of clips" in err
        assert "omnitokenizer" in err
        assert not (tmp_path / "out").exists()


def test_pictures_go_through_a_tokenizer_of_clips(model, tmp_path, capsys):
    folder(tmp_path / "p", 2, (16, 32))
    assert run(capsys, "encode", str(tmp_path / "p"), "-o", str(tmp_path / "s"), "-m", model)[0] == 0
    assert run(capsys, "decode", str(tmp_path / "s"), "-o", str(tmp_path / "out"), "-m", model)[0] == 0
    assert (tmp_path / "out" / "0000.png").exists()
    file = str(tmp_path / "a.vtk")
    assert run(capsys, "compress", str(tmp_path / "p" / "0000.png"), "-o", file, "-m", model)[0] == 0
    code, _, err = run(capsys, "decompress", file, "-o", str(tmp_path / "a.mp4"), "-m", model)
    assert (code, "holds a picture" in err) == (1, True)


def test_mistakes_are_one_line(root, model, tmp_path, capsys):
    to = ["-o", str(tmp_path / "a.vtk"), "-m", model]
    for words, told in [
        (["compress", str(root / "01.mp4"), *to], "01.mp4"),
        (["compress", str(root / "gone.mp4"), *to], "does not exist"),
        (
            ["compress", str(root / "00.mp4"), *to, "--length", "3"],
            "do not decode",
        ),
        (["eval", "--data", str(root / "01.mp4"), "-m", model], "not one of the 1 clips"),
    ]:
        code, printed, err = run(capsys, *words)
        assert (code, printed) == (1, "")
        assert told in err
        assert err.count("\n") == 1
        assert not (tmp_path / "a.vtk").exists()
