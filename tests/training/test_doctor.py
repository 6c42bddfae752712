"""The doctor, at the bedside of runs that really are sick, and of healthy ones that it must leave alone."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.pictures import encoded, folder
from tests.training import patient  # noqa: F401  (registers the system)
from vistok.cli.main import main
from vistok.data.items import Item, Source
from vistok.data.loader import PixelLoader
from vistok.errors import FormatError
from vistok.training import trainer
from vistok.training.chart import Chart, Finding, read_charts
from vistok.training.doctor import diagnose, examine
from vistok.training.prepare import build_model
from vistok.training.recipe import Recipe, check, load_recipe
from vistok.training.trainer import DivergedError, train


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("photos"), count=48, size=(20, 20))


def make(model=None, data=None, optimizer=None, loss=None, adversary=None, **changes) -> Recipe:
    train_section = {
        "steps": 72,
        "batch_size": 8,
        "checkpoint_every": 0,
        "log_every": 3,
        "sample_every": 0,
        "validate_every": 0,
        "ema": None,
        "tensorboard": False,
    } | changes
    plain = {
        "model": {"name": "patient"} | (model or {}),
        "data": {"size": 16, "workers": 0, "validation": 0} | (data or {}),
        "loss": loss or {},
        "optimizer": {"lr": 3e-3, "warmup": 5, "schedule": "constant"} | (optimizer or {}),
        "train": train_section,
        "adversary": adversary,
    }
    return check(plain, "test")


class Told:
    """A console that keeps what is said."""

    is_terminal = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def print(self, text: str, **_) -> None:
        self.lines.append(text)


def fall_ill(recipe: Recipe, photos: Any, run: Path) -> dict[str, Finding]:
    """Train, and see that the doctor said during the run what it finds afterwards, and that its cures can be taken."""
    told = Told()
    with suppress(DivergedError):  # some do not survive
        train(recipe, photos, run, console=told)
    findings = examine(run)
    warnings = [line for line in told.lines if line.startswith("warning: ")]
    for finding in findings:
        assert any(line.startswith(f"warning: {finding.name}: ") for line in warnings), (finding.name, warnings)
        assert finding.told
        assert finding.cure
        assert finding.evidence
        if finding.override is not None:
            build_model(load_recipe(run / "recipe.yaml", [finding.override]).model)
    assert len(warnings) == len(set(warnings))
    return {finding.name: finding for finding in findings}


PATCHGAN = {"name": "patchgan", "width": 16, "layers": 1}
HEALTHY = {
    "codebook": {},
    "averaged": {"ema": 0.9, "accumulate": 2, "optimizer": {"schedule": "cosine"}, "data": {"validation": 4}},
    "vqgan": {
        "model": {"name": "vqgan-tiny"},
        "data": {"size": 16},
        "optimizer": {"lr": 1e-3},
        "batch_size": 4,
        "steps": 40,
        "log_every": 2,
    },
    "judged": {"adversary": {"discriminator": PATCHGAN, "start": 24, "optimizer": {"lr": 1e-4}}},
    "strata": {"model": {"name": "strata-tiny"}, "data": {"size": 32}},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_raises_nothing(name, photos, tmp_path):
    assert fall_ill(make(**HEALTHY[name]), photos, tmp_path / "run") == {}


SICK = {  # the recipe's disease, what is found, and a key in it
    "one code serves all": ({"model": {"normalised": False}}, {"codebook-collapse"}, "model.restart_below=1.0"),
    "commitment": (
        {"model": {"normalised": False}, "loss": {"commitment": 3000}},
        {"codebook-collapse"},
        "loss.commitment=1.0",
    ),
    "half the codes": ({"model": {"codebook_size": 64, "spread": 3.0}}, {"dead-codes"}, "model.restart_below=1.0"),
    "far codebook": ({"model": {"spread": 100}}, {"dwarfing-term", "codebook-collapse"}, "loss.codebook="),
    "signed output": ({"model": {"signed": True}, "optimizer": {"lr": 1e-2}}, {"output-range"}, None),
    "zero term": ({"model": {"idle": True}}, {"dead-term"}, "loss.perceptual=0"),
    "detached term": ({"model": {"detached": True}}, {"dead-term"}, "loss.edges=0"),
    "blocked": ({"model": {"blocked": True}}, {"vanishing-gradient", "dead-term"}, "optimizer.lr="),
    "saturated": (
        {"model": {"saturated": True, "normalised": False}},
        {"vanishing-gradient", "codebook-collapse"},
        "optimizer.lr=",
    ),
    "exploding": (
        {"optimizer": {"name": "sgd", "lr": 8.0, "clip": None, "warmup": 10}, "log_every": 1, "steps": 16},
        {"exploding-gradient", "learning-rate"},
        "optimizer.clip=1.0",
    ),
    "rate": ({"optimizer": {"lr": 3.0, "warmup": 30}}, {"learning-rate"}, "optimizer.lr=0.3"),
    "unequal fight": (
        {
            "optimizer": {"lr": 1e-4},
            "adversary": {
                "discriminator": PATCHGAN,
                "weight": 0.01,
                "adaptive": False,
                "optimizer": {"lr": 5e-3},
            },
        },
        {"discriminator-won"},
        "adversary.optimizer.lr=0.0005",
    ),
    "no rate": ({"optimizer": {"lr": 1e-9}}, {"stalled"}, "optimizer.lr=0.0001"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_diagnosed(name, photos, tmp_path):
    settings, diseases, key = SICK[name]
    found = fall_ill(make(**settings), photos, tmp_path / "run")
    assert set(found) >= diseases, found
    allowed = diseases | (
        {"codebook-collapse", "dead-codes", "dwarfing-term"} if name in ("rate", "exploding") else set()
    )
    assert set(found) <= allowed, found
    overrides = [finding.override or "" for finding in found.values()]
    assert key is None or any(override.startswith(key) for override in overrides), overrides


# -- pixels in a wrong range -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        (lambda pixels: pixels * 2 - 1, "(pixels + 1) / 2"),
        (lambda pixels: pixels * 255, "divide the pictures by 255"),
        (lambda pixels: (pixels - 0.45) / 0.22, "unnormalised"),
    ],
    ids=["signed", "bytes", "normalised"],
)
def test_pixels_of_another_range_are_named_at_the_first_row(wrong, cure, photos, tmp_path, monkeypatch):
    original = PixelLoader.batch
    monkeypatch.setattr(
        PixelLoader,
        "batch",
        lambda self, step: (batch := original(self, step)) | {"pixels": wrong(batch["pixels"])},
    )
    found = fall_ill(make(steps=3), photos, tmp_path / "run")
    assert set(found) == {"pixel-range"}
    assert cure in found["pixel-range"].cure


class Dark(Source):
    """Pictures in [0, 1] that somebody has stored as 8-bit numbers."""

    kind, name = "folder", "dark"

    def __len__(self) -> int:
        return 16

    def item(self, index: int) -> Item:
        values = np.random.RandomState(index).rand(16, 16, 3)
        return Item(f"{index}", lambda: encoded(Image.fromarray(values.round().astype(np.uint8))))

    def _contents(self):
        yield "dark"


def test_pictures_that_are_black_by_mistake_are_named(tmp_path):
    found = fall_ill(make(steps=9), Dark(), tmp_path / "run")
    assert next(iter(found)) == "pixel-range"
    assert "multiply the pictures by 255" in found["pixel-range"].cure


# -- overfitting -----------------------------------------------------------------------------------------------------


def test_a_run_that_learns_its_pictures_by_heart_is_named(photos, tmp_path):
    noise = tmp_path / "noise"
    noise.mkdir()
    for index in range(4):
        Image.fromarray(np.random.RandomState(index).randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            noise / f"{index}.png"
        )
    recipe = make(
        model={"codebook_size": 256, "width": 8},
        data={"validation": str(photos), "flip": False},
        optimizer={"lr": 1e-2},
        steps=160,
        validate_every=20,
        log_every=10,
    )
    found = fall_ill(recipe, noise, tmp_path / "run")
    assert found["overfitting"].override == "data.flip=true"
    assert "dB at step 160, while the training loss went on falling" in found["overfitting"].told


# -- the command and the rows ----------------------------------------------------------------------------------------


def test_the_command_prints_findings_and_json(photos, tmp_path, capsys):
    train(make(model={"idle": True}), photos, tmp_path / "run")
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as left:
            main(["doctor", str(tmp_path / "run"), *options])
        assert left.value.code == 0
        said = capsys.readouterr().out
        assert "dead-term" in said
        assert "loss.perceptual=0" in said
    document = json.loads(said)
    assert document["step"] == 72
    assert [finding["subject"] for finding in document["findings"]] == ["perceptual"]


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(FormatError, match="not a run's folder"):
        examine(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(tmp_path)])
    assert left.value.code == 1
    assert "recipe.yaml" in capsys.readouterr().err


def test_a_resumed_run_says_nothing_twice_and_keeps_its_rows(photos, tmp_path, monkeypatch):
    recipe, told = make(model={"idle": True}, checkpoint_every=30), Told()
    original = trainer.Trainer._after_step

    def stop(self, last):
        original(self, last)
        if self.step == 40:
            raise RuntimeError("stop")

    monkeypatch.setattr(trainer.Trainer, "_after_step", stop)
    with pytest.raises(RuntimeError, match="stop"):
        train(recipe, photos, tmp_path / "run", console=told)
    monkeypatch.setattr(trainer.Trainer, "_after_step", original)
    train(recipe, photos, tmp_path / "run", resume=True, console=told)
    assert len([line for line in told.lines if line.startswith("warning: dead-term")]) == 1
    rows = read_charts(tmp_path / "run")[0].rows
    assert [int(row["step"]) for row in rows] == list(range(3, 73, 3))


def test_a_key_that_a_stage_sets_itself_is_named_there(photos, tmp_path):
    plain = make(log_every=4).plain()
    plain["stages"] = [
        {"name": "own", "model": {"name": "patient", "normalised": False}, "train": {"steps": 72}},
        {"name": "last", "optimizer": {"lr": 1e-3}, "train": {"steps": 2}},
    ]
    found = fall_ill(check(plain, "test"), photos, tmp_path / "run")
    assert found["codebook-collapse"].override == "stages.0.model.restart_below=1.0"
    last = read_charts(tmp_path / "run")[1]
    assert last.key("optimizer.lr=1e-4") == "stages.1.optimizer.lr=1e-4"
    assert last.key("optimizer.clip=1.0") == "optimizer.clip=1.0"


@pytest.mark.parametrize(
    ("width", "cure"), [(64, "model.init_std=0.057"), (512, "model.entropy=0.05")], ids=["narrow", "as published"]
)
def test_a_narrow_model_that_collapses_is_told_of_its_first_weights(width, cure):
    size = {"width": width, "layers": 1, "heads": 1}
    chart = Chart(make({"name": "titok-tiny-vq", "encoder": size, "decoder": size}, {"size": 32}, steps=1000))
    book = {"size/quantizer": 64, "seen/quantizer": 1024, "used/quantizer": 0.03, "perplexity/quantizer": 1.2}
    for step in range(10, 400, 10):
        chart.add({"step": step, "loss": 1 / step, "term/reconstruction": 1 / step} | book)
    found = {finding.name: finding for finding in diagnose(chart)}
    assert found["codebook-collapse"].override == cure


@pytest.mark.parametrize(("commitment", "perplexity", "ill"), [(4e-7, 40, True), (4e-7, 120, False), (4e-4, 40, False)])
def test_latents_that_are_alike_are_told_though_codes_are_restarted(commitment, perplexity, ill):
    chart = Chart(make(steps=400))
    for step in range(10, 401, 10):
        row = {"step": step, "loss": 5 - step / 1000, "term/commitment": max(1e-3 * 0.96 ** (step - 10), commitment)}
        use = {"size": 256.0, "seen": 5120.0, "used": 0.6, "perplexity": float(perplexity)}
        chart.add(row | {f"{key}/quantizer": value for key, value in use.items()})
    found = [finding for finding in diagnose(chart) if finding.name == "codebook-collapse"]
    assert bool(found) == ill
    assert not ill or "alike for all pictures" in found[0].told


def test_a_chart_stays_small_and_keeps_its_beginning_and_its_end():
    chart = Chart(make())
    for step in range(1, 5001):
        chart.add({"step": step, "loss": 1.0})
    steps = chart.series("step")
    assert len(steps) <= 256
    assert steps[0] == 1
    assert list(steps[-100:]) == list(range(4901, 5001))
    assert (np.diff(steps) > 0).all()


def test_measuring_costs_next_to_nothing(photos, tmp_path):
    chart = Chart(make())
    random = np.random.RandomState(0)
    for step in range(1, 301):
        row = {"step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 1.0, "term/reconstruction": 1 / step}
        chart.add(row | {f"grad/{part}": random.rand() for part in "abcdef"})
    began = time.process_time()
    for _ in range(10):
        diagnose(chart)
    assert (time.process_time() - began) / 10 < 0.05
