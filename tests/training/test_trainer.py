"""The trainer's promises: the same bits after any interruption, nothing lost, and clear refusals."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vistok
from tests.training import pupil
from vistok.errors import ConfigError, FormatError, InputError, MismatchError, OutputError, VistokError
from vistok.training import checkpoint, trainer
from vistok.training.recipe import Recipe, check
from vistok.training.run import RunFolder
from vistok.training.trainer import DivergedError, StoppedError, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for index in range(24):
        small = random.randint(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(small).resize((24, 20), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


def make(stages=(), model=None, data=None, optimizer=None, loss=None, **changes) -> Recipe:
    train_section = {
        "steps": 12,
        "batch_size": 4,
        "checkpoint_every": 4,
        "log_every": 3,
        "sample_every": 0,
        "validate_every": 0,
        "ema": 0.9,
        "tensorboard": False,
    } | changes
    plain = {
        "model": {"name": "pupil"} | (model or {}),
        "data": {"size": 16, "workers": 0, "validation": 2} | (data or {}),
        "loss": loss or {},
        "optimizer": {"lr": 0.01, "warmup": 3} | (optimizer or {}),
        "train": train_section,
        "stages": list(stages),
    }
    return check(plain, "test")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def exact(run: Path) -> dict:
    """Everything of a finished run that must not depend on how often it was interrupted."""
    last = checkpoint.load_latest(run / "checkpoints")
    timeless = [
        {k: v for k, v in row.items() if k not in ("images_per_second", "waiting")} for row in rows(run / "log.csv")
    ]
    return {
        "step": last.step,
        "model": {name: tensor.clone() for name, tensor in last.model.items()},
        "ema": last.ema,
        "left": load_file(run / "model" / "model.safetensors"),
        "log": timeless,
        "validation": rows(run / "validation.csv"),
    }


def same(first: dict, second: dict) -> bool:
    weights = all(
        first[part].keys() == second[part].keys()
        and all(torch.equal(first[part][name], second[part][name]) for name in first[part])
        for part in ("model", "ema", "left")
    )
    return weights and all(first[key] == second[key] for key in ("step", "log", "validation"))


class Killed(BaseException):
    """What a kill looks like from inside: nothing catches it."""


def interrupted(recipe: Recipe, photos: Path, run: Path, kills: list[int], monkeypatch) -> None:
    """Train, dying right after each of these steps before anything of that step is written, and resuming."""
    original = trainer.Trainer._after_step
    for kill in kills:

        def die(self, last, kill=kill):
            if self.step == kill:
                raise Killed
            original(self, last)

        monkeypatch.setattr(trainer.Trainer, "_after_step", die)
        with pytest.raises(Killed):
            train(recipe, photos, run, resume=True)
    monkeypatch.setattr(trainer.Trainer, "_after_step", original)
    train(recipe, photos, run, resume=True)


STAGES = [
    {"name": "all", "train": {"steps": 7}},
    {"name": "decoder", "freeze": ["encoder"], "train": {"steps": 5, "batch_size": 2}, "optimizer": {"lr": 0.002}},
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16", "channels_last": True},
        {"accumulate": 2, "ema": None, "optimizer": {"name": "sgd", "clip": None}},
        {"stages": STAGES, "validate_every": 5},
    ],
    ids=["plain", "bf16", "accumulated", "stages"],
)
def test_a_run_resumed_after_kills_ends_in_the_same_bits(settings, photos, tmp_path, monkeypatch):
    recipe = make(**settings)
    train(recipe, photos, tmp_path / "whole")
    interrupted(recipe, photos, tmp_path / "killed", [2, 6, 7, 9, 10], monkeypatch)
    whole, killed = exact(tmp_path / "whole"), exact(tmp_path / "killed")
    if recipe.train.ema is None:
        assert whole["ema"] is None
        whole["ema"] = killed["ema"] = {}
    assert same(whole, killed)
    assert whole["step"] == 12
    assert [int(row["step"]) for row in whole["log"]] == ([3, 6, 7, 9, 12] if recipe.stages else [3, 6, 9, 12])


def test_the_comparison_sees_another_seed(photos, tmp_path):
    train(make(), photos, tmp_path / "one")
    train(make(seed=1), photos, tmp_path / "two")
    assert not same(exact(tmp_path / "one"), exact(tmp_path / "two"))


def command(recipe: Path, photos: Path, run: Path, *more: str) -> list[str]:
    words = ["train", str(recipe), "--data", str(photos), "-o", str(run), *more]
    return [sys.executable, "-m", "tests.command", *words]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def write_recipe(path: Path, recipe: Recipe) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(recipe.plain()))
    return path


def test_a_process_killed_with_9_resumes_to_the_same_bits(photos, tmp_path):
    recipe = make(steps=120, checkpoint_every=10, log_every=4, data={"workers": 1})
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    run = tmp_path / "killed"
    process = subprocess.Popen(command(file, photos, run), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while len(checkpoint.steps_in(run / "checkpoints")) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < checkpoint.steps_in(run / "checkpoints")[-1] < 120
    train(recipe, photos, run, resume=True)
    train(recipe, photos, tmp_path / "whole")
    assert same(exact(run), exact(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_leaves_a_checkpoint_and_one_line(number, photos, tmp_path):
    file = write_recipe(tmp_path / "recipe.yaml", make(steps=100_000, checkpoint_every=0, log_every=1))
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(file, photos, run),
        env=environment(),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 300
    while (not (run / "log.csv").exists() or len(rows(run / "log.csv")) < 3) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(number)
    out, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert told.splitlines()[-1].startswith(f"error: stopped by {number.name} after step")
    step = checkpoint.steps_in(run / "checkpoints")[-1]
    assert step >= 3
    assert vistok.load(run / "model").fingerprint
    assert int(rows(run / "log.csv")[-1]["step"]) == step


def test_it_learns_and_leaves_a_model_folder_and_pictures(photos, tmp_path):
    recipe = make(steps=150, log_every=25, validate_every=50, sample_every=75, optimizer={"lr": 0.02}, tensorboard=True)
    left = train(recipe, photos, tmp_path / "run")
    log = rows(tmp_path / "run" / "log.csv")
    assert list(log[0])[:4] == ["step", "loss", "pixels", "commitment"]
    assert float(log[-1]["loss"]) < 0.5 * float(log[0]["loss"])
    assert float(log[0]["loss"]) == pytest.approx(float(log[0]["pixels"]) + float(log[0]["commitment"]), rel=1e-6)
    measured = rows(tmp_path / "run" / "validation.csv")
    assert [row["step"] for row in measured] == ["50", "100", "150"]
    assert all(float(row["psnr"]) > 12 for row in measured)  # 9 dB before training
    tok = vistok.load(left)
    assert tok.steps_seen == 150
    picture = Image.open(photos / "00.png")
    assert tok.decode(tok.encode(picture)).shape == (1, 3, 20, 24)
    samples = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert samples == ["step-00000075.png", "step-00000150.png"]
    assert Image.open(tmp_path / "run" / "samples" / samples[0]).size == (2 * 18, 2 * 18)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == [148, 150]


def test_held_out_pictures_are_never_trained_on(photos, tmp_path, monkeypatch):
    seen = set()
    original = pupil.Pupil.loss

    def watch(self, batch, step, rng):
        seen.update(batch["id"])
        return original(self, batch, step, rng)

    monkeypatch.setattr(pupil.Pupil, "loss", watch)
    train(make(steps=20), photos, tmp_path / "run")
    assert len(seen) == 22
    assert {path.name for path in photos.iterdir()} - seen == {"06.png", "18.png"}


def test_ema_is_the_average_that_it_says(photos, tmp_path, monkeypatch):
    weights = []
    monkeypatch.setattr(
        pupil.Pupil, "after_step", lambda self, step: weights.append(self.decoder.weight.detach().clone())
    )
    starts = []
    initialise = pupil.Pupil.initialise
    monkeypatch.setattr(
        pupil.Pupil,
        "initialise",
        lambda self, *rest: (initialise(self, *rest), starts.append(self.decoder.weight.detach().clone())),
    )
    left = train(make(steps=5, ema=0.3), photos, tmp_path / "run")
    average = starts[0]
    for step, weight in enumerate(weights):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert len(starts) == 1
    assert torch.allclose(vistok.load(left).decoder.weight, average, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch(photos, tmp_path):
    exact_model = {"dropout": 0.0, "noise": 0.0, "pace": 0.0}
    frozen = [{"name": "decoder", "freeze": ["encoder"]}]  # batch norm in evaluation mode: items do not interact
    shared = {"steps": 1, "model": exact_model, "stages": frozen, "optimizer": {"name": "sgd", "warmup": 0}}
    train(make(**shared), photos, tmp_path / "one")
    train(make(**shared, accumulate=4), photos, tmp_path / "four")
    one, four = exact(tmp_path / "one")["model"], exact(tmp_path / "four")["model"]
    assert torch.allclose(one["decoder.weight"], four["decoder.weight"], atol=1e-6)
    assert not torch.equal(one["decoder.weight"], exact(tmp_path / "one")["left"]["decoder.weight"])


def test_frozen_parts_do_not_move(photos, tmp_path):
    train(
        make(steps=4, checkpoint_every=2, stages=[{"name": "one", "freeze": ["encoder.*", "decoder.bias"]}]),
        photos,
        tmp_path / "run",
    )
    early, late = (checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-0000000{step}") for step in (2, 4))
    moved = {name for name in early.model if not torch.equal(early.model[name], late.model[name])}
    assert "decoder.weight" in moved
    assert moved <= {"decoder.weight", "quantizer.vectors", "steps_seen"}


def test_loss_weights_scale_their_terms(photos, tmp_path):
    train(make(steps=1, log_every=1), photos, tmp_path / "one")
    train(make(steps=1, log_every=1, loss={"commitment": 0.5}), photos, tmp_path / "half")
    one, half = (rows(tmp_path / name / "log.csv")[0] for name in ("one", "half"))
    assert float(half["commitment"]) == pytest.approx(0.5 * float(one["commitment"]), rel=1e-6)
    assert half["pixels"] == one["pixels"]


@pytest.mark.parametrize("step", [0, 9])
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(step, photos, tmp_path):
    with pytest.raises(DivergedError, match=f"loss term commitment is nan at step {step}"):
        train(make(model={"broken_at": step}), photos, tmp_path / "run")
    kept = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert (kept.step if kept else None) == (8 if step else None)
    if kept:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.model.values() if tensor.is_floating_point())


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_gradient_that_is_not_finite_names_the_parameter(value, photos, tmp_path, monkeypatch):
    original = pupil.Pupil.loss

    def poison(self, batch, step, rng):
        terms = original(self, batch, step, rng)
        if step == 5:
            self.decoder.bias.register_hook(lambda grad: grad * float(value))
        return terms

    monkeypatch.setattr(pupil.Pupil, "loss", poison)
    with pytest.raises(DivergedError, match=r"gradient of decoder\.bias is not finite at step 5"):
        train(make(), photos, tmp_path / "run")


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": {"widht": 3}}, "unknown key 'widht'; did you mean 'width'"),
        ({"model": {"width": "wide"}}, "width"),
        ({"model": {"name": "toy"}}, "does not define a training loss"),
        ({"loss": {"pixel": 1.0}}, "no such term; did you mean 'pixels'"),
        ({"stages": [{"name": "one", "freeze": ["encodr"]}]}, "'encodr'.*did you mean 'encoder'"),
        ({"stages": [{"name": "one", "freeze": ["*"]}]}, "nothing left to train"),
        ({"accumulate": 3}, "not a multiple"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(settings, told, photos, tmp_path):
    from tests import toy  # noqa: F401

    with pytest.raises(ConfigError, match=told):
        train(make(**settings), photos, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_an_existing_run_is_refused_unless_resumed_or_overwritten(photos, tmp_path):
    run = tmp_path / "run"
    train(make(steps=2), photos, run)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="--resume continues it, --overwrite"):
        train(make(steps=2), photos, run)
    with pytest.raises(MismatchError, match=r"train\.steps is 2 there and 3 here"):
        train(make(steps=3), photos, run, resume=True)
    train(make(steps=2), photos, run, resume=True)
    train(make(steps=3), photos, run, overwrite=True)
    assert checkpoint.steps_in(run / "checkpoints") == [3]
    assert (run / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_not_a_run_is_never_touched(photos, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="not a run"):
            train(make(), photos, tmp_path, **options)
    assert (tmp_path / "thesis.tex").exists()


def test_other_data_is_refused_on_resume(photos, tmp_path):
    run = tmp_path / "run"
    train(make(steps=2), photos, run)
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(photos.iterdir())[:20]:
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(MismatchError, match=r"24 pictures.*here 20"):
        train(make(steps=2), other, run, resume=True)


def test_data_without_pictures_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError):
        train(make(), tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(photos, tmp_path, caplog):
    run = tmp_path / "run"
    train(make(), photos, run)
    whole = exact(run)
    last = run / "checkpoints" / "step-00000012" / "model.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    train(make(), photos, run, resume=True)
    assert "step-00000012" in caplog.text
    assert "damaged" in caplog.text
    assert same(exact(run), whole)


def test_a_run_without_a_single_whole_checkpoint_says_so(photos, tmp_path):
    run = tmp_path / "run"
    train(make(), photos, run)
    for file in run.glob("checkpoints/*/state.pt"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(FormatError, match="can be read"):
        train(make(), photos, run, resume=True)


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
@pytest.mark.parametrize("room", [500, 2500])  # for none of the weights; for the weights but not the moments
def test_a_full_disk_keeps_the_checkpoint_before_and_can_be_resumed(room, photos, tmp_path, monkeypatch):
    import resource

    run = tmp_path / "run"
    original = checkpoint.save

    def full(folder, written):
        if written.step != 8:
            return original(folder, written)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            return original(folder, written)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OutputError, match=r"step-00000008: .*[Tt]oo large.*; the one before it is kept"):
        train(make(model={"width": 2}), photos, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert vistok.load(run / "model").steps_seen == 4
    monkeypatch.undo()
    train(make(model={"width": 2}), photos, run, resume=True)
    train(make(model={"width": 2}), photos, tmp_path / "whole")
    assert same(exact(run), exact(tmp_path / "whole"))


def test_a_log_cut_short_by_a_kill_is_mended(photos, tmp_path):
    run = tmp_path / "run"
    train(make(), photos, run)
    whole = exact(run)
    for folder in (run / "checkpoints").glob("step-00000012"):
        (folder / "checkpoint.json").unlink()
    log = run / "log.csv"
    log.write_bytes(log.read_bytes()[:-9])
    train(make(), photos, run, resume=True)
    assert same(exact(run), whole)


def test_unreadable_pictures_are_skipped_and_counted(photos, tmp_path):
    import io

    from rich.console import Console

    data = tmp_path / "data"
    data.mkdir()
    for path in photos.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "05.png").write_bytes(b"not a picture")
    text = io.StringIO()
    train(make(), data, tmp_path / "run", console=Console(file=text, width=200))
    assert "1 pictures cannot be read and were skipped" in text.getvalue()
    assert "images/s" in text.getvalue()
    assert "ETA" in text.getvalue()


def test_weights_to_start_from_are_not_drawn_anew(photos, tmp_path, monkeypatch):
    left = train(make(steps=2), photos, tmp_path / "run")
    monkeypatch.setattr(pupil.Pupil, "initialise", lambda *_: pytest.fail("the codebook has been learnt already"))
    recipe = check(make().plain() | {"model": {"init": str(left)}}, "fine-tuning")
    again = train(recipe, photos, tmp_path / "tuned")
    assert vistok.load(again).steps_seen == 2 + 12


def test_a_kill_between_the_last_checkpoint_and_its_model_is_mended(photos, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = RunFolder.save_model

    def die(self, model):
        if model.steps_seen == 12:
            raise Killed
        original(self, model)

    monkeypatch.setattr(RunFolder, "save_model", die)
    with pytest.raises(Killed):
        train(make(), photos, run)
    assert vistok.load(run / "model").steps_seen == 8
    monkeypatch.undo()
    assert vistok.load(train(make(), photos, run, resume=True)).steps_seen == 12


def test_errors_are_of_the_library():
    assert issubclass(DivergedError, VistokError)
    assert issubclass(StoppedError, VistokError)
