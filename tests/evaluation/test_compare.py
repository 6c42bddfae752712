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
from vistok.evaluation.compare import Limits, compare, markdown
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
