"""TokBench and VTBench on pictures: words whose truth is known, a reader of one's own, and the commands."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests.cli.test_eval import run
from vistok.data.rendered_text import render, write_text_bench
from vistok.data.samples import patterns, photographs
from vistok.errors import FormatError, InputError, UnknownNameError
from vistok.evaluation.readers import build_reader
from vistok.evaluation.tokbench import scenes, tokbench
from vistok.evaluation.vtbench import Preprocess, run_task, tasks


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    where = tmp_path_factory.mktemp("bench")
    write_text_bench(where, photographs(3, 128), words=4)
    return where


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return vistok.create("vq-vae-tiny")


def bright(crops):
    """A reader that tells by the mean brightness alone, so that its answers are known."""
    return [f"{int(crop.mean()) // 64}" for crop in crops]


def test_rendered_words_are_where_they_are_said_to_be(bench):
    plain = list(photographs(3, 128))
    for number, scene in enumerate(scenes(bench)):
        image = np.asarray(Image.open(scene.path)).astype(int)
        changed = (np.abs(image - np.asarray(plain[number]).astype(int)) > 20).any(2)
        assert scene.words
        for _, (left, top, right, bottom), ratio in scene.words:
            assert changed[top:bottom, left:right].mean() > 0.05
            changed[top - 1 : bottom + 1, left - 1 : right + 1] = False
            assert ratio == pytest.approx((bottom - top) / 128)
        assert not changed.any(), "nothing is drawn outside the boxes"


def test_words_depend_on_the_seed_alone():
    picture = next(photographs(1, 128))
    one, other = (render(picture, 5, np.random.default_rng(3)) for _ in range(2))
    assert one[1] == other[1]
    assert one[0].tobytes() == other[0].tobytes()
    with pytest.raises(InputError, match="latin"):
        render(picture, 5, np.random.default_rng(0), ["klingon"])


def test_patterns_are_fine_and_differ():
    found = [np.asarray(one).astype(int) for one in patterns(8, 64)]
    assert all(np.abs(np.diff(one, axis=1)).mean() + np.abs(np.diff(one, axis=0)).mean() > 5 for one in found)
    assert len({one.tobytes() for one in found}) == 8


def test_scores_against_a_reader_of_known_answers(bench, tokenizer):
    found = tokbench(tokenizer, scenes(bench), "256", lambda crops: ["x"] * len(crops), refine=False)
    assert found.words == found.annotated > 6
    assert found.text["t-acc"].overall == 0
    perfect = {}
    for scene in scenes(bench):
        perfect[len(perfect)] = [word for word, _, _ in scene.words]
    calls = iter([answers for place in perfect for answers in (perfect[place], perfect[place])])
    exact = tokbench(tokenizer, scenes(bench), "256", lambda crops: next(calls))
    assert exact.text["t-acc"].overall == exact.text["t-ned"].overall == 1
    with pytest.raises(InputError, match="no word is left"):
        tokbench(tokenizer, scenes(bench), "256", lambda crops: ["?"] * len(crops))


def test_faces_are_embedded_at_the_originals_points(bench, tokenizer, tmp_path):
    (tmp_path / "annotations").mkdir()
    points = [[40, 40], [80, 40], [60, 60], [45, 80], [75, 80]]
    row = {
        "image_name": str(bench / "images" / "0000.png"),
        "faces": [{"kps": points, "box": [], "gt": "", "ratio": 0.3}],
    }
    (tmp_path / "annotations" / "face_meta.json").write_text(json.dumps([row]))

    def embed(pairs):
        return np.stack([np.array([1.0, float(picture.mean() > 0) * points[0, 0]]) for picture, points in pairs])

    found = tokbench(tokenizer, scenes(tmp_path), "256", bright, faces=embed)
    assert found.faces["f-sim"].bins[2] == pytest.approx(1)
    assert not found.text


def test_other_folders(tmp_path):
    with pytest.raises(InputError, match="annotations"):
        scenes(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "text_x.json").write_text('[{"file_name": "a.png"}]')
    with pytest.raises(FormatError, match="text_x"):
        scenes(tmp_path)
    with pytest.raises(UnknownNameError, match="package"):
        build_reader("tesseract")
    with pytest.raises(InputError, match="task1-imagenet"):
        tasks(tmp_path)


def test_vtbench_scores(tokenizer):
    pictures = [(one, "some text") for one in photographs(3, 64)]
    how = Preprocess(32, standardize=False)
    plain = run_task(tokenizer, "task1-imagenet", pictures, preprocess=how)
    assert plain.values.keys() == {"psnr", "ssim", "vtbench_psnr", "vtbench_ssim"}
    answers = iter(["some text", "some test"] * 3)
    read = run_task(tokenizer, "task3-movie-posters", pictures, preprocess=how, page_reader=lambda _: next(answers))
    assert read.values["cer"] == pytest.approx(1 / 9)
    assert read.values["wer"] == pytest.approx(1 / 2)
    assert read.values["vtbench_wer"] == pytest.approx(1 / 2)
    assert read.values["cer_floor"] == 0
    assert read.values["psnr"] == pytest.approx(plain.values["psnr"])
    with pytest.raises(InputError, match="no pictures"):
        run_task(tokenizer, "task1-imagenet", [], preprocess=how)


def test_commands(capsys, tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path / "model")
    monkeypatch.setattr("vistok.evaluation.readers.rapidocr", lambda: lambda crops: ["EXIT"] * len(crops))
    monkeypatch.setattr("vistok.evaluation.readers.rapidocr_pages", lambda: lambda picture: "EXIT")
    words = ["-m", tmp_path / "model", "--limit", 8]
    told = run(capsys, "bench", "tokbench", *words, "--json").out
    (result,) = json.loads(told)["results"]
    assert result["text"]["t-acc"]["overall"] == 1
    assert 0 < result["words"] < result["annotated"]
    tasks_ = {one["task"]: one for one in json.loads(run(capsys, "bench", "vtbench", *words, "--json").out)["results"]}
    assert len(tasks_) == 3
    assert tasks_["task3-movie-posters"]["values"]["cer"] == 0
    assert "task2" in run(capsys, "bench", "vtbench", *words).out
    assert "no setting" in run(capsys, "bench", "tokbench", *words, "--setting", "333", code=1).err
