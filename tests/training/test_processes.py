"""Two processes train what one trains with the same global batch: losses, codebooks, the model that is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import vistok
from tests.data.pictures import folder
from tests.training import team
from tests.training.test_trainer import rows
from vistok.errors import ConfigError
from vistok.training import checkpoint, sharding
from vistok.training.recipe import Recipe, check, load_recipe
from vistok.training.trainer import train

ROOT = Path(__file__).parents[2]
TIMES = ("images_per_second", "waiting")


def make(
    name: str = "patient", size: int = 16, lr: float = 0.05, adversary=None, stages=(), train=None, **config
) -> Recipe:
    plain = {
        "model": {"name": name} | ({"normalised": False} if name == "patient" else {}) | config,
        "data": {"size": size, "workers": 0, "validation": 2},
        "optimizer": {"name": "sgd", "lr": lr, "warmup": 2},
        "train": {
            "steps": 6,
            "batch_size": 4,
            "log_every": 2,
            "checkpoint_every": 0,
            "sample_every": 0,
            "validate_every": 3,
            "ema": 0.9,
            "tensorboard": False,
            "threads": 1,
        }
        | (train or {}),
        "adversary": adversary,
        "stages": list(stages),
    }
    return check(plain, "test")


# BatchNorm over the pictures of all processes, LeCAM's means, the adaptive weight
PATCHGAN = {
    "discriminator": {"name": "patchgan", "width": 8, "layers": 2},
    "start": 2,
    "lecam": 0.1,
    "lecam_decay": 0.5,
    "optimizer": {"lr": 0.05},
}
STAGES = [
    {"name": "all", "train": {"steps": 4}},
    {"name": "decoder", "freeze": ["encoder", "quantizer"], "train": {"steps": 2}},
]
RECIPES = {
    "gradient": make(spread=0.3),
    "ema": make(spread=0.3, learning="ema"),
    "restart": make(spread=0.3, restart_below=1.0),  # rows are replaced by latents drawn from both processes
    "ema-restart": make(spread=0.3, learning="ema", restart_below=1.0),
    "online": make(spread=0.3, learning="cvq"),
    "entropy": make(spread=0.3, entropy=0.1),
    "fitted": make("strata-tiny", 32, level_weights=[0.0, 0.0, 1.0]),  # PCA and k-means before the first step
    "cosine": make("vqgan-llamagen-tiny", lr=0.01, entropy=0.05),
    "judged": make("vqgan-tiny", 24, lr=0.01, adversary=PATCHGAN),
    "resumed": make(spread=0.3, learning="ema", restart_below=1.0, train={"checkpoint_every": 2}),
}
SHARDED = {
    "sharded": make("vqgan-tiny", 24, lr=0.01, adversary=PATCHGAN, train={"fsdp": True}),
    "sharded-resumed": make(spread=0.3, train={"fsdp": True, "checkpoint_every": 2}, stages=STAGES),
    "sharded-bf16": make("titok-tiny", 32, lr=0.01, train={"fsdp": True, "precision": "bf16"}),
}
SURVEYS = ("seen/", "used/", "perplexity/")  # which begin again where a run is resumed
STOPS = {"resumed": 5, "sharded-resumed": 3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("photos"), count=24, size=(36, 36))


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory) -> Path:
    """RUNS/one/NAME and RUNS/two/NAME."""
    below = tmp_path_factory.mktemp("runs")
    team.spawn(below / "two", photos, RECIPES | SHARDED, stops=STOPS)
    threads = torch.get_num_threads()
    for name, recipe in (RECIPES | SHARDED).items():
        train(whole(recipe), photos, below / "one" / name)
    torch.set_num_threads(threads)
    return below


def whole(recipe: Recipe) -> Recipe:
    """The recipe without shards, which one process does not have."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"fsdp": False})})


def agree(one: Path, two: Path) -> None:
    """Losses and validation within 1e-3, weights and codebooks within 1e-4 of their size."""
    for log, tolerance in (("log.csv", 1e-3), ("vitals.csv", 2e-3), ("validation.csv", 1e-3)):
        first, second = rows(one / log), rows(two / log)
        assert [row.keys() for row in first] == [row.keys() for row in second]
        for before, after in zip(first, second, strict=True):
            for key in before.keys() - set(TIMES):
                if before[key] or after[key]:
                    if key.startswith(("pixel_", "output_")):  # of the main process's own pictures
                        continue
                    if two.name in STOPS and key.startswith(SURVEYS):
                        continue
                    wanted = pytest.approx(float(before[key]), rel=tolerance, abs=1e-6)
                    assert float(after[key]) == wanted, (log, key, before["step"])
    first, second = load_file(one / "model" / "model.safetensors"), load_file(two / "model" / "model.safetensors")
    assert first.keys() == second.keys()
    for key, value in first.items():
        if value.is_floating_point():
            scale = float(value.abs().max())
            torch.testing.assert_close(second[key], value, atol=1e-4 * scale + 1e-6, rtol=0, msg=lambda m, k=key: k + m)
        else:
            assert torch.equal(second[key], value), key


@pytest.mark.parametrize("name", [*RECIPES, "sharded", "sharded-resumed"])
def test_two_processes_train_what_one_trains(name, runs):
    agree(runs / "one" / name, runs / "two" / name)


def test_shards_train_in_half_precision(runs):
    """Whose sums round differently in every layout."""
    one, two = (rows(runs / many / "sharded-bf16" / "log.csv") for many in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        assert float(after["loss"]) == pytest.approx(float(before["loss"]), rel=1e-2)


def test_the_comparison_sees_another_seed(photos, runs, tmp_path):
    other = RECIPES["ema"].model_copy(update={"train": RECIPES["ema"].train.model_copy(update={"seed": 1})})
    train(other, photos, tmp_path / "other")
    with pytest.raises(AssertionError):
        agree(runs / "one" / "ema", tmp_path / "other")


def test_what_is_left_knows_nothing_of_processes(runs):
    for name in ("ema", "fitted", *SHARDED):
        saved = checkpoint.load_latest(runs / "two" / name / "checkpoints")
        fresh = vistok.load(runs / "two" / name / "model")
        assert saved.model.keys() == saved.ema.keys() == fresh.state_dict().keys()


def test_shards_need_company(photos, tmp_path):
    with pytest.raises(ConfigError, match="torchrun"):
        train(SHARDED["sharded"], photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_torchrun_trains_one_run(photos, tmp_path):
    """The command as users start it, on plain SGD so that rounding stays rounding."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make("vqgan-tiny", lr=0.01).plain()))
    words = ["-m", "vistok", "train", str(recipe), "--data", str(photos), "-o"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*launch, *words, str(tmp_path / "two")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert (ended.stderr.count("step 6/6"), ended.stderr.count("done: ")) == (1, 1)  # one voice
    train(load_recipe(recipe), photos, tmp_path / "one")
    agree(tmp_path / "one", tmp_path / "two")


def test_the_switch_of_accelerate_launch_is_heeded_and_taken_from_it(monkeypatch):
    monkeypatch.setattr(sharding, "_ASKED", False)
    assert not sharding.asked(False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding.asked(False)
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    assert sharding.asked(False)  # for a second run in the same process
