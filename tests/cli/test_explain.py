import json

import pytest

import vistok
from tests.cli.test_eval import run
from tests.data.pictures import folder


@pytest.fixture
def results(tmp_path, capsys):
    vistok.create("strata-tiny").save(tmp_path / "model")
    folder(tmp_path / "p", 2, (64, 64))
    words = ["-m", tmp_path / "model", "--data", tmp_path / "p"]
    files = []
    for name in ("vistok", "seed-voken"):
        files.append(tmp_path / f"{name}.json")
        told = run(capsys, "eval", *words, "--size", 48, "--protocol", name, "--length", 4, "--json")
        files[-1].write_text(told.out)
    return words, files


def test_terms_and_ladder(capsys, results):
    words, files = results
    told = run(capsys, "explain", *files).out
    assert "rounding" in told
    assert "0.2 dB" in told
    assert "says nothing about the models" in told
    found = json.loads(run(capsys, "explain", *files, *words, "--size", 48, "--json").out)
    assert [rung["term"] for rung in found["ladder"]] == ["", "crop", "rounding"]
    assert {one["first"]["metric"] for one in found["explanations"]} == {"psnr", "ssim"}
    assert "nothing that is written down differs" in run(capsys, "explain", files[0], files[0]).out


def test_bad_input(capsys, tmp_path, results):
    words, files = results
    (tmp_path / "other.json").write_text("{}")
    assert "no receipts" in run(capsys, "explain", files[0], tmp_path / "other.json", code=1).err
    assert "no protocol" in run(capsys, "eval", *words, "--protocol", "lamagen", code=1).err
    assert "NAME=FILE" in run(capsys, "eval", *words, "--weights", "inception", code=1).err
    assert "nothing here uses" in run(capsys, "eval", *words, "--weights", "inception=a.pth", code=1).err
    assert "no file" in run(capsys, "eval", *words, "--metrics", "fid", "--weights", "inception=a.pth", code=1).err
