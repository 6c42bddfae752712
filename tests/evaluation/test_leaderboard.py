"""The leaderboard: equal budgets, one entry from training to the page, failures as lines, claims from the catalogue."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.sources import open_source
from vistok.errors import FormatError
from vistok.evaluation import leaderboard
from vistok.evaluation.leaderboard import BOARDS, Entry, best_claim, budgeted, entries, failed, measure, page, read
from vistok.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
CIFAR = BOARDS["cifar10"]


def seen(recipe):
    return [(held.train.steps, held.train.batch_size) for _, held in recipe.resolved()]


@pytest.mark.parametrize("name", ["vq-vae/tiny", "titok/tiny", "karl/tiny", "vqgan/tiny"])
def test_every_recipe_sees_as_many_pictures(name):
    recipe = load_recipe(name)
    found = budgeted(recipe, CIFAR)
    assert sum(steps * batch for steps, batch in seen(found)) == pytest.approx(CIFAR.pictures, rel=0.02)
    share = seen(found)[-1][0] / seen(recipe)[-1][0]
    for (_, before), (_, after) in zip(recipe.resolved(), found.resolved(), strict=True):
        assert after.train.steps / before.train.steps == pytest.approx(share, rel=0.03)
        assert (after.data.size, after.data.validation, after.train.seed) == (CIFAR.size, 0, 0)
        if before.adversary is not None:
            assert after.adversary.start / before.adversary.start == pytest.approx(share, rel=0.05)


def test_what_is_on_a_board():
    found = {entry.key: unfit for entry, unfit in entries(CIFAR)}
    assert found["cifar10/strata"] == found["cifar10/strata-tiny"] == found["cifar10/titok-tiny"] == ""
    assert found["cifar10/himtok-tiny"] == "takes a mask"
    assert not [key for key in found if "llamagen" in key or "tome" in key]
    at_64 = {entry.key: unfit for entry, unfit in entries(BOARDS["imagenet-samples"])}
    assert at_64["imagenet-samples/titok-tiny"] == "takes no pictures of 64 pixels"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A board of a few pictures, in the folder that is given back."""
    board = replace(CIFAR, train="train", test="test", count=6, pictures=64)
    monkeypatch.setitem(BOARDS, "cifar10", board)
    monkeypatch.setattr(leaderboard, "JUDGE_STEPS", 2)
    rng = np.random.default_rng(0)

    for half in ("train", "test"):
        for label in range(10):
            (tmp_path / half / str(label)).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / half / str(label) / f"{number}.png")
    assert len(open_source(tmp_path / "train").classes) == 10
    return tmp_path


def test_one_entry_from_training_to_the_page(small):
    entry = Entry("cifar10", "vq-vae-tiny", "vq-vae", "vq-vae/tiny")
    found = json.loads(json.dumps(measure(entry, small, small / "runs")))
    assert found["spent"]["pictures"] == 64
    assert found["spent"]["processor_seconds"] > 0
    row = found["reconstruction"]["prefixes"][-1]
    assert row["bits_per_pixel"] == pytest.approx(9 / 16)
    assert row["distances"]["fid"] > 0
    assert found["reconstruction"]["images"] == 6
    told = page({entry.key: found})
    line = next(line for line in told.splitlines() if line.startswith("| `vq-vae/tiny`"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:4] == ["0.562", f"{row['psnr']:.2f}"]
    assert cells[10] == "64"
    assert float(cells[9]) > 0


def test_what_ships_is_not_trained(small):
    found = measure(Entry("cifar10", "vq-vae-cifar10", "vq-vae"), small, small / "runs")
    assert found["spent"] == {}
    assert "| ships |" in page({"cifar10/vq-vae-cifar10": found})
    assert list((small / "runs").iterdir()) == [small / "runs" / "judge.pt"]


def test_a_failure_is_a_line_and_loses_nothing(small):
    entry = Entry("cifar10", "titok-tiny", "titok", "titok/nothing")
    spec, target = small / "spec.json", small / "out.json"
    spec.write_text(json.dumps({"entry": asdict(entry), "data": str(small), "runs": "runs", "target": str(target)}))
    threads = torch.get_num_threads()
    (small / "runs").mkdir()
    assert leaderboard.main(str(spec)) == 1
    torch.set_num_threads(threads)
    held = json.loads(target.read_text())
    assert "titok/nothing" in held["error"]
    assert "Without numbers: titok-tiny" in page({entry.key: held})


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / "x.json"
    path.write_text(json.dumps(failed(Entry("cifar10", "x", "x"), "broken")))
    assert list(read(tmp_path)) == ["cifar10/x"]
    path.write_text("{}")
    with pytest.raises(FormatError, match=r"x\.json"):
        read(tmp_path)


def test_claims_are_the_catalogues():
    assert best_claim("titok") == "*rFID 0.84, titok-bl-128-vae*"
    assert best_claim("strata") == ""
    told = page({})
    assert "| `robusttok-4096` | robusttok | 256 |" in told
    assert "gFID" not in told


def test_the_command_runs_what_is_not_there_yet(small, monkeypatch):
    spec = importlib.util.spec_from_file_location("measure_leaderboard", ROOT / "benchmarks" / "leaderboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", small / "results")
    ran = []

    def run(command, **options):
        held = json.loads(Path(command[-1]).read_text())
        ran.append(held["entry"]["name"])
        return type("Done", (), {"returncode": 9})

    monkeypatch.setattr(module.subprocess, "run", run)
    arguments = ["leaderboard.py", "--data", "D", "-o", "R", "--board", "cifar10", "--only", "himtok-tiny", "strata"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    results = {path.stem: json.loads(path.read_text()) for path in (small / "results" / "cifar10").iterdir()}
    assert ran == ["strata"]
    assert results["strata"]["error"] == "the process ended with 9"
    assert results["himtok-tiny"]["error"] == "takes a mask"


def test_the_page_is_that_of_the_results():
    path = ROOT / "docs" / "leaderboard.md"
    assert path.read_text(encoding="utf-8") == page(read(ROOT / "benchmarks" / "results" / "leaderboard"))
