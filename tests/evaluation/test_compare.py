"""A comparison: its numbers, what survives of a failure, resuming, and the page in a browser."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests.cli.test_eval import run
from tests.data.pictures import folder
from vistok.errors import InputError
from vistok.evaluation import compare as module
from vistok.evaluation import contestant
from vistok.evaluation.compare import Limits, compare
from vistok.evaluation.fidelity import Fidelity
from vistok.evaluation.report import markdown
from vistok.metrics.psnr import psnr

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two tokenizers and one that is not there, on three pictures."""
    where = tmp_path_factory.mktemp("compare")
    folder(where / "p", 3, (70, 64))
    torch.manual_seed(0)
    for name in ("vq-vae-tiny", "strata-tiny"):
        vistok.create(name).save(where / name)
    models = [str(where / "strata-tiny"), str(where / "vq-vae-tiny"), "no-such-model"]
    seen = []
    result = compare(
        models,
        str(where / "p"),
        where / "r.html",
        size=64,
        show=2,
        codecs=["jpeg"],
        progress=lambda *told: seen.append(told),
    )
    return where, models, result, seen


def test_numbers_are_the_tokenizers(compared):
    where, models, result, seen = compared
    rows = {(row["name"], row["tokens"]): row for row in result["rows"] if not row["codec"]}
    tokenizer = vistok.load(models[1])
    found = []
    for path in sorted((where / "p").iterdir()):
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"))[3:67].copy()).permute(2, 0, 1)[None]
        found.append(psnr(tokenizer.decode(tokenizer.encode(pixels), dtype=torch.uint8), pixels)[0])
    assert rows[models[1], 256]["psnr"] == pytest.approx(float(torch.stack(found).mean()), abs=1e-4)
    assert len([row for row in result["rows"] if row["name"] == models[0]]) == 3
    assert result["failed"].keys() == {"no-such-model"}
    assert "UnknownNameError" in result["failed"]["no-such-model"]
    assert result["contestants"][0]["codebooks"][0]["counted"] > 0
    assert (models[0], 3, 3) in seen
    jpeg = [row for row in result["rows"] if row["name"] == "jpeg"]
    assert len(jpeg) == 3
    assert len({row["bpp"] for row in jpeg}) == 1, "no JPEG of 64 pixels is so small: its smallest file stands there"


def test_files_beside_the_page(compared):
    where, _, result, _ = compared
    assert json.loads((where / "r.json").read_text())["rows"] == result["rows"]
    assert (where / "r.md").read_text() == markdown(result)
    page = (where / "r.html").read_text()
    held = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1).replace("<\\/", "</"))
    assert len(held["shown"]) == 2
    assert len(held["shown"][0]["rebuilt"]) == 3
    assert "http" not in re.sub(r"data:image[^\"]*", "", page), "the page needs no network"


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_page_in_a_browser(compared):
    where, _, _, _ = compared
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    told = subprocess.run(
        [BROWSER, *flags, (where / "r.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert 'data-ready="8"' in told.stdout, "two pictures of original, two tokenizers and JPEG"
    assert told.stdout.count("<canvas") == 8
    assert "no-such-model failed" in told.stdout


def test_it_goes_on_and_limits_decide_the_pareto_set(compared, monkeypatch):
    where, models, result, _ = compared
    monkeypatch.setattr(module.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("nothing is measured anew"))
    told = {"size": 64, "show": 2, "codecs": ["jpeg"]}
    again = compare(models[:2], str(where / "p"), where / "r.html", **told)
    assert again["rows"] == result["rows"]
    assert any(row["pareto"] for row in again["rows"])
    none = compare(models[:2], str(where / "p"), where / "r.html", limits=Limits(milliseconds=1e-6), **told)
    assert not any(row["pareto"] for row in none["rows"])


def test_bad_input(tmp_path, capsys):
    folder(tmp_path / "p", 1, (64, 64))
    with pytest.raises(InputError, match=r"\.html"):
        compare([None], str(tmp_path / "p"), tmp_path / "report.pdf")
    with pytest.raises(InputError, match="not one tokenizer"):
        compare(["no-such-model"], str(tmp_path / "p"), tmp_path / "r.html", codecs=[])
    assert "--data" in run(capsys, "compare", code=1).err


def test_command(compared, capsys):
    where, models, _, _ = compared
    words = [
        "compare",
        *models,
        "--data",
        where / "p",
        "-o",
        where / "r.html",
        "--size",
        64,
        "--show",
        2,
        "--codecs",
        "jpeg",
    ]
    told = run(capsys, *words)
    assert "| jpeg |" in told.out
    assert "failed: no-such-model" in told.out
    assert "r.html" in told.err


READER = """
import numpy as np


def bright():
    return lambda crops: [str(int(np.asarray(crop).mean() > 128)) for crop in crops]


def colour():
    return lambda pairs: np.stack([picture[int(p[0][1]), int(p[0][0])].astype(float) + 1 for picture, p in pairs])
"""


@pytest.fixture
def annotated(tmp_path, monkeypatch):
    """TokBench's layout: a bright and a dark word and a face; and a reader and an embedder in a module of one's own."""
    picture = np.full((64, 64, 3), 100, np.uint8)
    picture[8:24, 8:24], picture[40:56, 40:56], picture[32, 20] = 250, 10, (200, 40, 90)
    (tmp_path / "t" / "images").mkdir(parents=True)
    (tmp_path / "t" / "annotations").mkdir()
    Image.fromarray(picture).save(tmp_path / "t" / "images" / "a.png")
    words = [("1", [8, 8, 24, 24]), ("0", [40, 40, 56, 56]), ("7", [0, 0, 4, 4])]  # the last is misread at once
    rows = [{"rec": rec, "bbox": box, "ratio": 0.25} for rec, box in words]
    text = [{"file_name": "a.png", "height": 64, "width": 64, "annotations": rows}]
    (tmp_path / "t" / "annotations" / "text_a.json").write_text(json.dumps(text))
    faces = [{"image_name": "a.png", "faces": [{"kps": [[20, 32]] * 5, "ratio": 0.3}]}]
    (tmp_path / "t" / "annotations" / "face_meta.json").write_text(json.dumps(faces))
    (tmp_path / "own_readers.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    folder(tmp_path / "p", 2, (64, 64))
    torch.manual_seed(0)
    vistok.create("strata-tiny").save(tmp_path / "model")
    return tmp_path


class Here:
    """A contestant's process that is none: what it would do is done at once."""

    def __init__(self, command, **_):
        self.returncode = contestant.main(command[-1])

    def poll(self):
        return self.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_text_and_faces_are_columns_and_decide_the_pareto_set(annotated, monkeypatch):
    monkeypatch.setattr(module.subprocess, "Popen", Here)
    absent = Fidelity(str(annotated / "t"), str(annotated / "t"), "no_such_module:reader")
    told = {"size": 64, "show": 1, "codecs": []}
    plain = compare([str(annotated / "model")], str(annotated / "p"), annotated / "r.html", fidelity=absent, **told)
    assert any("text is not measured" in note and "no_such_module" in note for note in plain["notes"])
    assert any("faces are not measured" in note and "--embedder" in note for note in plain["notes"])
    assert all(row["t_acc"] is None and row["f_sim"] is None for row in plain["rows"])
    assert plain["pareto_over"] == ["tokens", "bits", "PSNR", "SSIM", "time", "licence"]
    assert "text is not measured" in (annotated / "r.md").read_text()
    with pytest.raises(InputError, match="no annotations"):
        compare([None], str(annotated / "p"), annotated / "r.html", fidelity=Fidelity(text=str(annotated / "p")))
    wanted = Fidelity(str(annotated / "t"), str(annotated / "t"), "own_readers:bright", "own_readers:colour", 64)
    name = str(annotated / "model")
    told["codecs"] = ["jpeg"]
    result = compare([name], str(annotated / "p"), annotated / "r.html", fidelity=wanted, **told)
    model, picture = vistok.load(name), Image.open(annotated / "t" / "images" / "a.png")
    tokens = model.encode(picture)
    rows = [row for row in result["rows"] if not row["codec"]]
    for row in rows:
        rebuilt = model.decode(tokens.prefix(int(row["tokens"])), dtype=torch.uint8)[0].permute(1, 2, 0).numpy()
        right = [(rebuilt[8:24, 8:24].mean() > 128) == 1, (rebuilt[40:56, 40:56].mean() > 128) == 0]
        assert row["t_acc"] == row["t_ned"] == pytest.approx(np.mean(right))
        before, after = np.array([200, 40, 90]) + 1.0, rebuilt[32, 20].astype(float) + 1
        cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
        assert row["f_sim"] == pytest.approx(cosine)
    assert (result["fidelity"]["words"], result["fidelity"]["faces"]) == (2, 1)
    assert result["pareto_over"] == ["tokens", "bits", "PSNR", "SSIM", "time", "text", "faces", "licence"]
    assert all(row["t_acc"] is None for row in result["rows"] if row["codec"])
    table = (annotated / "r.md").read_text()
    assert "| words right | text 1 - NED | faces |" in table
    assert "2 words read by own_readers:bright; 1 faces embedded by own_readers:colour" in table
    assert "text, 1 - edit distance" in (annotated / "r.html").read_text()


def test_the_pareto_set_by_hand():
    def row(name, tokens, quality, text):
        return {
            "name": name,
            "tokens": tokens,
            "bpp": tokens,
            "psnr": quality,
            "ssim": 0.5,
            "t_ned": text,
            "within": True,
        }

    times = {name: {"encode_ms": 1.0, "decode_ms": ms} for name, ms in (("a", 1.0), ("b", 2.0))}
    rows = [row("a", 4, 20.0, 0.1), row("a", 8, 19.0, 0.2), row("b", 8, 19.0, 0.2), row("b", 8, 19.0, 0.9)]
    for one in rows:
        one["f_sim"] = None
    over = module._pareto(rows, times)
    assert over == ["tokens", "bpp", "psnr", "ssim", "ms", "t_ned", "free"]
    assert [one["pareto"] for one in rows] == [True, True, False, True], "the third is the second, slower"
    for one in rows:
        one["t_ned"] = None
    module._pareto(rows, times)
    assert [one["pareto"] for one in rows] == [True, False, False, False], "without text nothing speaks for more tokens"
    times["b"]["licence"] = "Apache-2.0"
    module._pareto(rows, times)
    assert [one["pareto"] for one in rows] == [True, False, True, True], "b may be used where a may not"
