import json

import pytest

import tests.toy  # noqa: F401
import vistok
from tests.data.pictures import folder
from vistok.cli.main import main


def run(capsys, *words, code=0):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert left.value.code == code, printed.err
    return printed


@pytest.fixture
def words(tmp_path):
    vistok.create("strata-tiny").save(tmp_path / "model")
    folder(tmp_path / "p", 3, (64, 64))
    (tmp_path / "p" / "0002.png").write_bytes(b"x")
    return ["eval", "-m", tmp_path / "model", "--data", tmp_path / "p", "--size", 64]


def test_table(capsys, words):
    told = run(capsys, *words)
    assert "centre crop of 64 x 64 pixels" in told.out
    assert "perplexity" in told.out
    assert "level0" in told.out
    assert "unreadable and skipped: 1" in told.err


def test_json(capsys, words):
    document = json.loads(run(capsys, *words, "--json").out)
    assert document["images"] == 2
    assert list(document["skipped"]) == ["0002.png"]
    assert {"tokens", "bits_per_pixel", "psnr", "ssim", "ms_ssim"} <= document["prefixes"][0].keys()
    assert len(document["prefixes"]) == 3
    assert {"segment", "usage", "perplexity"} <= document["codebooks"][0].keys()
    assert document["images_per_second"] > 0
    only = json.loads(run(capsys, *words, "--json", "--limit", 1, "--length", 4).out)
    assert (only["images"], [row["tokens"] for row in only["prefixes"]]) == (1, [4])


def test_mistakes_are_one_line(capsys, words, tmp_path):
    (tmp_path / "empty").mkdir()
    for changed, told in [
        (["--data", tmp_path / "empty"], "holds no images"),
        (["--length", 3], "do not decode on their own"),
        (["-m", "strat"], "did you mean"),
    ]:
        printed = run(capsys, *words, *changed, code=1)
        assert told in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_clip_score_beside_captions(capsys, words, tmp_path):
    pytest.importorskip("transformers")
    from tests.metrics.test_clip_score import tiny_clip

    judged = [*words, "--metrics", "clip-score", "--weights", f"clip-score={tiny_clip(tmp_path / 'tiny')}"]
    assert "has no captions" in run(capsys, *judged, code=1).err
    (tmp_path / "p" / "captions.jsonl").write_text('{"file_name": "0000.png", "text": "a sea"}\n')
    told = run(capsys, *judged)
    assert "clip_score of the originals" in told.out
    assert "100 max(cos, 0)" in told.out
    document = json.loads(run(capsys, *judged, "--json").out)
    (receipt, *_) = [one for one in document["receipts"] if one["metric"] == "clip_score"]
    assert receipt["protocol"]["samples"] == 1
    assert receipt["value"] == document["prefixes"][0]["clip_score"]
