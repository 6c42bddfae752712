"""reconstruct: sizes, names, prefixes, numbers that agree with the files, and bad pictures among good ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests.cli.test_main import run
from tests.training import pupil  # noqa: F401
from vistok.cli.reconstruct import output_names
from vistok.metrics.psnr import psnr
from vistok.pixels import from_pil


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    vistok.create("strata-tiny").save(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, size in (("a.png", (40, 30)), ("b.jpg", (33, 64)), ("below/a.webp", (64, 32))):
        small = random.randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def test_every_picture_of_a_folder_comes_back_in_its_size(capsys, model, photos, tmp_path):
    code, out, _ = run(capsys, "reconstruct", str(photos), "-m", model, "-o", str(tmp_path / "out"), "--json")
    document = json.loads(out)
    assert code == 0
    assert document["failed"] == []
    assert [Path(entry["output"]).name for entry in document["results"]] == ["a.png", "b.png", "a-2.png"]
    for entry in document["results"]:
        original, rebuilt = Image.open(entry["input"]), Image.open(entry["output"])
        assert rebuilt.size == original.size
        assert entry["bpp"] == entry["bits"] / (original.width * original.height)
        assert entry["psnr"] == pytest.approx(float(psnr(from_pil(original), from_pil(rebuilt))[0]))
        tok = vistok.load(model)
        tokens = tok.encode(original)
        assert (entry["tokens"], entry["bits"]) == (tokens.length, int(tokens.bits()[0]))


def test_a_prefix_takes_fewer_bits(capsys, model, photos, tmp_path):
    words = ["reconstruct", str(photos / "a.png"), "-m", model, "-o", str(tmp_path / "out"), "--json"]
    whole = json.loads(run(capsys, *words)[1])["results"][0]
    first = vistok.load(model).encode(Image.open(photos / "a.png")).segments[0].count
    part = json.loads(run(capsys, *words, "--length", str(first))[1])["results"][0]
    assert part["tokens"] == first < whole["tokens"]
    assert part["bits"] < whole["bits"]
    code, out, _ = run(capsys, *words, "--length", str(first + 1))
    assert code == 1
    assert str(first) in json.loads(out)["failed"][0]["error"]
    assert run(capsys, *words, "--length", "100000")[0] == 1


def test_bad_pictures_are_reported_and_the_others_done(capsys, model, photos, tmp_path):
    (photos / "empty.png").touch()
    whole = (photos / "a.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    inputs = [str(photos / name) for name in ("empty.png", "a.png", "cut.png", "missing.png")]
    code, out, err = run(capsys, "reconstruct", *inputs, "-m", model, "-o", str(tmp_path / "out"), "--json")
    document = json.loads(out)
    assert code == 1
    assert [Path(entry["input"]).name for entry in document["failed"]] == ["empty.png", "cut.png", "missing.png"]
    assert [Path(entry["input"]).name for entry in document["results"]] == ["a.png"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    assert err.count("failed:") == 3
    assert "Traceback" not in err


def test_wildcards_and_text(capsys, model, photos, tmp_path):
    words = ["-m", model, "-o", str(tmp_path / "out")]
    code, out, _ = run(capsys, "reconstruct", str(photos / "*.[jp]*g"), *words)
    assert code == 0
    assert [line.split(" -> ")[0] for line in out.splitlines()] == [str(photos / "a.png"), str(photos / "b.jpg")]
    assert run(capsys, "reconstruct", str(photos / "*.gif"), *words)[0] == 1
    assert "nothing matches" in run(capsys, "reconstruct", str(photos / "*.gif"), *words)[2]


def test_no_output_replaces_another_or_an_input(tmp_path):
    inputs = [str(tmp_path / name) for name in ("a.png", "x/a.jpg", "b.jpg", "y/B.webp", "a-2.gif")]
    names = output_names(inputs, tmp_path)
    assert [name.name for name in names] == ["a-2.png", "a-3.png", "b.png", "B-2.png", "a-2-2.png"]


def test_an_input_in_the_output_folder_is_kept(capsys, model, photos):
    before = (photos / "a.png").read_bytes()
    assert run(capsys, "reconstruct", str(photos / "a.png"), "-m", model, "-o", str(photos))[0] == 0
    assert (photos / "a.png").read_bytes() == before
    assert (photos / "a-2.png").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_an_output_folder_that_cannot_be_written_is_one_line(capsys, model, photos, tmp_path):
    blocked = tmp_path / "blocked"
    if os.geteuid() == 0:  # root writes through any permission: a file in the way stands for it
        blocked.touch()
        target = blocked / "out"
    else:
        blocked.mkdir(mode=0o500)
        target = blocked / "out"
    code, out, err = run(capsys, "reconstruct", str(photos / "a.png"), "-m", model, "-o", str(target))
    assert (code, out) == (1, "")
    assert "cannot make the folder" in err
    assert err.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(capsys, model, photos, tmp_path, monkeypatch):
    import vistok.files

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vistok.files.os, "fsync", full)
    code, _, err = run(capsys, "reconstruct", str(photos), "-m", model, "-o", str(tmp_path / "out"))
    assert code == 1
    assert "No space left on device" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_generic_model_name_that_does_not_exist_is_one_line(capsys, photos):
    code, _, err = run(capsys, "reconstruct", str(photos), "-m", "no-such-model")
    assert code == 1
    assert err.count("\n") == 1


def test_clips_come_back_with_size_frames_and_rate(capsys, model, photos, tmp_path):
    """A model of pictures sees a clip frame by frame, one of clips in windows; a broken one does not stop the rest."""
    from tests import toy  # noqa: F401  registers the toy
    from tests.data.moving import moving
    from vistok.data.video import open_clip, read_clip, write_clip

    original = moving(7, 33, 46)
    write_clip(photos / "clip.mp4", [original], rate=12)
    (photos / "broken.mp4").write_bytes(b"nothing")
    vistok.create("toy-video").save(tmp_path / "toy-video")
    for name in (model, str(tmp_path / "toy-video")):
        out_folder = tmp_path / "out" / Path(name).name
        code, out, _ = run(capsys, "reconstruct", str(photos), "-m", name, "-o", str(out_folder), "--json")
        document = json.loads(out)
        assert code == 1
        assert [Path(entry["input"]).name for entry in document["failed"]] == ["broken.mp4"]
        assert len(document["results"]) == 4
        entry = document["results"][-1]
        assert Path(entry["output"]).name == "clip.mp4"
        assert (entry["size"], entry["frames"], entry["rate"]) == ([33, 46], 7, 12)
        assert entry["bpp"] == entry["bits"] / (7 * 33 * 46)
        rebuilt = open_clip(entry["output"])
        assert (rebuilt.size, rebuilt.rate, sum(1 for _ in rebuilt.frames())) == ((33, 46), 12, 7)
        pixels = read_clip(photos / "clip.mp4")[0]
        tokenizer = vistok.load(name)
        decoded = tokenizer.decode(tokenizer.encode(pixels), dtype=torch.uint8)
        expected = psnr(decoded[0].transpose(0, 1), pixels[0].transpose(0, 1)).mean()
        assert entry["psnr"] == pytest.approx(float(expected), abs=0.01)
    code, _, err = run(
        capsys, "reconstruct", str(photos / "clip.mp4"), "-m", name, "-o", str(tmp_path / "x"), "--length", "3"
    )
    assert code == 1
    assert "3 tokens do not decode" in err
    assert not (tmp_path / "x" / "clip.mp4").exists()
