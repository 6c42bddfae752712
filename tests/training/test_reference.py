"""Reference curves: recorded from several seeds, found by settings, and what a run is told."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

import tests.training.pupil
from vistok.errors import InputError
from vistok.inventory import recipe_names
from vistok.training import reference
from vistok.training.recipe import FOLDER, Recipe, check, load_recipe
from vistok.training.reference import Comparison, Curve, Point, find_curve, record, settings_fingerprint
from vistok.training.trainer import train

STEPS = [20, 40, 60, 80, 100, 120, 140, 160]
SAME = {"items": 5, "fingerprint": "same"}


def make(**changes) -> Recipe:
    plain = {
        "model": {"name": "pupil"},
        "data": {"size": 16, "workers": 0, "validation": 0},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 8, "batch_size": 4, "log_every": 1, "checkpoint_every": 4, "tensorboard": False},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        plain[section][name] = value
    return check(plain, "test")


def curve() -> Curve:
    points = tuple(Point(step, 1 / step, 0.9 / step, 1.1 / step) for step in STEPS[1::2])
    return Curve("fake/tiny", "", 40, points, {"items": 5, "fingerprint": "same"})


def run_of(losses, data=SAME) -> tuple[list[str], str | None]:
    comparison = Comparison(curve(), data)
    told = [comparison.add(step, loss) for step, loss in zip(STEPS, losses, strict=False)]
    return [line for line in told if line], comparison.verdict()


def test_a_run_within_the_band():
    told, verdict = run_of([1 / step for step in (40, 40, 80, 80, 120, 120, 160, 160)])
    assert told == []
    assert verdict.startswith("within the reference curve of fake/tiny at all 4 points (loss 0.00625 at step 160")


def test_leaving_the_band_is_said_once_and_so_is_the_return():
    told, verdict = run_of([1 / 40, 1 / 40, 1.0, 1.0, 1.0, 1.0, 1 / 160, 1 / 160])
    assert [line.split(":")[0] for line in told] == ["step 80", "step 160"]
    assert "above the reference's band" in told[0]
    assert "again within" in told[1]
    assert verdict.startswith("outside the reference curve of fake/tiny at 2 of 4 points, first at step 80")
    assert "below" in run_of([0.0, 0.0])[0][0]


def test_points_are_means_over_their_interval():
    told, _ = run_of([2 / 40, 0.0])  # a mean of 1/40
    assert told == []


def test_other_data_get_no_verdict():
    told, verdict = run_of([9.0] * 8, {"items": 7, "fingerprint": "other"})
    assert told == []
    assert "recorded on other data (5 pictures): loss 9 at step 160, 0.00625 there; no verdict" in verdict


def test_nothing_is_said_before_the_first_point_nor_of_rows_that_miss_the_intervals():
    assert run_of([1.0])[1] is None
    comparison = Comparison(curve(), SAME)
    for step in (30, 60, 90):
        assert comparison.add(step, 9.0) is None
    comparison.add(120, 9.0)  # rows of 30 steps end with an interval at 120, but have not seen it whole
    assert comparison.verdict() is None


def test_settings_that_do_not_matter():
    first = settings_fingerprint(make())
    for key, value in {"train__seed": 5, "train__log_every": 2, "train__threads": 1, "data__workers": 2}.items():
        assert settings_fingerprint(make(**{key: value})) == first
    for key, value in {"optimizer__lr": 0.02, "train__steps": 9, "model__width": 9, "data__flip": False}.items():
        assert settings_fingerprint(make(**{key: value})) != first


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for index in range(8):
        small = random.randint(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def recorded(photos, tmp_path_factory) -> Path:
    """A folder of recipes with one curve in it, of three seeds."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("recorded")
    runs = [root / f"run-{seed}" for seed in range(3)]
    for seed, run in enumerate(runs):
        train(make(train__seed=seed), photos, run)
    record("pupil/tiny", runs, root / "recipes" / "pupil" / "tiny.curve.json")
    return root


def test_a_curve_is_the_mean_of_the_seeds(recorded):
    found = Curve.read(recorded / "recipes" / "pupil" / "tiny.curve.json")
    losses = []
    for seed in range(3):
        with open(recorded / f"run-{seed}" / "log.csv", newline="") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert [point.step for point in found.points] == list(range(1, 9))
    assert [point.loss for point in found.points] == pytest.approx(np.mean(losses, 0), rel=1e-4)
    assert all(
        point.low < min(values) <= max(values) < point.high
        for point, *values in zip(found.points, *losses, strict=True)
    )
    plain = json.loads((recorded / "recipes" / "pupil" / "tiny.curve.json").read_text())
    assert plain["seeds"] == [0, 1, 2]
    assert plain["environment"]["torch"] == torch.__version__


def told_by(recipe, photos, folder, **options) -> str:
    with open(folder.with_suffix(".txt"), "w") as file:
        train(recipe, photos, folder, console=Console(file=file, width=200), **options)
    return folder.with_suffix(".txt").read_text()


def test_training_says_how_it_compares(recorded, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", recorded / "recipes")
    assert "within the reference curve of pupil/tiny at all 8 points" in told_by(
        make(train__seed=7), photos, tmp_path / "a"
    )
    assert "reference" not in told_by(make(optimizer__lr=0.02), photos, tmp_path / "b")
    (tmp_path / "fewer").mkdir()
    for path in list(photos.iterdir())[:6]:
        (tmp_path / "fewer" / path.name).write_bytes(path.read_bytes())
    assert "recorded on other data (8 pictures)" in told_by(make(), tmp_path / "fewer", tmp_path / "c")
    again = told_by(make(train__seed=7), photos, tmp_path / "a", resume=True)  # from its log alone
    assert "at all 8 points" in again


def test_a_run_that_goes_wrong_is_told_so_while_it_trains(recorded, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", recorded / "recipes")
    monkeypatch.setattr(
        tests.training.pupil.Pupil, "initialise", lambda self, batches, rng: self.decoder.bias.fill_(9.0)
    )
    told = told_by(make(), photos, tmp_path / "a")
    assert "is above the reference's band" in told
    assert "outside the reference curve of pupil/tiny at" in told


def test_healthy_runs_stay_in_the_band(tmp_path, monkeypatch):
    """Curves of two and of three seeds, from losses with noise that falls as they do; further seeds beside them."""
    random = np.random.RandomState(0)
    means = 1 / np.arange(1, 21)

    def losses() -> list[tuple[int, float]]:
        return list(zip(range(1, 21), means * (1 + 0.05 * random.randn(20)), strict=True))

    left = 0
    for trial in range(60):
        runs = [tmp_path / f"{trial}-{seed}" for seed in range(2 + trial % 2)]
        for seed, run in enumerate(runs):
            run.mkdir()
            recipe = make(train__steps=20, train__seed=seed)
            (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.plain()))
            (run / "run.json").write_text(json.dumps(SAME))
            (run / "log.csv").write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in losses()))
        found = Comparison(record("x", runs, tmp_path / "x.json"), SAME)
        for step, loss in losses():
            found.add(step, loss)
        left += not found.verdict().startswith("within")
    assert left <= 4


def test_stages_lend_each_other_nothing(tmp_path):
    """Losses of a hundred and of one: the second's band is its own, and the interval on the border is left out."""
    plain = make(train__steps=190).plain() | {"stages": [{"name": "a"}, {"name": "b", "train": {"steps": 210}}]}
    runs = [tmp_path / str(seed) for seed in range(3)]
    for seed, run in enumerate(runs):
        run.mkdir()
        plain["train"]["seed"] = seed
        (run / "recipe.yaml").write_text(yaml.safe_dump(plain))
        (run / "run.json").write_text(json.dumps(SAME))
        losses = [(step, (100.0 if step <= 190 else 1.0) * (1 + 0.1 * seed)) for step in range(1, 401)]
        (run / "log.csv").write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in losses))
    points = record("x", runs, tmp_path / "x.json").points
    assert [point.step for point in points] == [step for step in range(20, 401, 20) if step != 200]
    for point in points:
        size = 110 if point.step <= 190 else 1.1
        assert point.loss == pytest.approx(size)
        assert point.high - point.low == pytest.approx(2 * 6 * 0.1 * size / 1.1)


def test_runs_that_cannot_make_a_curve(recorded, photos, tmp_path):
    with pytest.raises(InputError, match="different seeds"):
        record("x", [recorded / "run-0", recorded / "run-0"], tmp_path / "x.json")
    train(make(optimizer__lr=0.02, train__seed=9), photos, tmp_path / "other")
    with pytest.raises(InputError, match="one recipe on the same data"):
        record("x", [recorded / "run-0", tmp_path / "other"], tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*/*.curve.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_curve_on_file_is_that_of_its_recipe(path):
    found = Curve.read(path)
    name = f"{path.parent.name}/{path.name.removesuffix('.curve.json')}"
    assert found.recipe == name
    assert path.name.removesuffix(".curve.json") in recipe_names(path.parent.name)
    assert find_curve(load_recipe(name)) == found, f"{name} has changed; benchmarks/curves.py records it anew"
    assert len(found.points) >= 10
