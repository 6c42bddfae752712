"""What a user gets wrong, and what the world does to a run: told in one line, nothing half-written, nothing lost."""

from pathlib import Path

import pytest
import torch

import vistok
from tests.training import pupil
from tests.training.test_trainer import exact, interrupted, make, photos, same  # noqa: F401
from vistok.cli.main import main as start
from vistok.errors import ConfigError, InputError, VistokError
from vistok.training.recipe import check
from vistok.training.trainer import train

JUDGED = {
    "model": {"name": "vqgan-tiny"},
    "data": {"size": 32, "workers": 0, "validation": 2},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 2, "batch_size": 4, "sample_every": 0, "tensorboard": False},
}


def main(arguments: list[str]) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        start(arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def spoilt(photos, tmp_path) -> Path:  # noqa: F811
    """The photographs, some of which are no pictures: text, cut in half, empty."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "05.png").write_bytes(b"not a picture")
    half = (folder / "11.png").read_bytes()
    (folder / "11.png").write_bytes(half[: len(half) // 2])
    (folder / "17.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_pictures_in_an_epoch_leave_a_run_reproducible(workers, spoilt, tmp_path, monkeypatch):
    recipe = make(data={"workers": workers})
    seen: set[str] = set()
    original = pupil.Pupil.loss

    def loss(self, batch, step, rng):
        seen.update(Path(name).name for name in batch["id"])
        return original(self, batch, step, rng)

    monkeypatch.setattr(pupil.Pupil, "loss", loss)
    train(recipe, spoilt, tmp_path / "whole")  # 12 steps of 4: more than two epochs of 22 pictures
    assert len(seen) >= 18
    assert not seen & {"05.png", "11.png", "17.png"}
    interrupted(recipe, spoilt, tmp_path / "killed", [3, 7, 10], monkeypatch)
    assert same(exact(tmp_path / "whole"), exact(tmp_path / "killed"))


def test_too_many_corrupt_pictures_stop_the_run_and_say_which(photos, tmp_path):  # noqa: F811
    folder = tmp_path / "rotten"
    folder.mkdir()
    for index, path in enumerate(sorted(photos.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes() if index % 3 == 0 else b"\xff\xd8\xff")
    with pytest.raises(InputError, match=r"\.png"):
        train(make(), folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"adversary": {"discriminator": {"name": "patchgn"}}}, "did you mean 'patchgan'"),
        ({"adversary": {"discriminator": {"name": "patchgan", "layer": 2}}}, "layer"),
        ({"adversary": {"discriminator": {"name": "patchgan", "layers": 4}}}, "at least 48, and data.size is 32"),
        ({"adversary": {"discriminator": {"name": "stylegan", "size": 64}}}, "data.size is 32"),
        ({"adversary": {"discriminator": {"name": "patchgan"}, "kind": "hing"}}, "did you mean 'hinge'"),
        ({"adversary": {"discriminator": {"name": "patchgan"}, "optimizer": {"rl": 1}}}, "adversary.optimizer"),
        ({"perceptual": {"name": "lpips"}}, "lpips-vgg"),
        ({"perceptual": {"name": "lpips-vgg", "weights": "nowhere.pth"}}, "nowhere.pth"),
        ({"perceptual": {"name": "steerable", "levls": 3}}, "levls"),
        ({"teachers": {"codes": "vqgan-tiny"}}, "teacher"),
        ({"model": {"name": "strata-tiny"}, "perceptual": {"name": "steerable"}}, "not judged"),
    ],
)
def test_judges_that_cannot_be_leave_no_run_behind(sections, told, photos, tmp_path):  # noqa: F811
    with pytest.raises(VistokError, match=told):
        train(check(JUDGED | sections, "test"), photos, tmp_path / "run")
    assert "teachers" in sections or not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("adversary", "told"),
    [
        ({"weight": -1}, "adversary.weight"),
        ({"weight": float("nan")}, "adversary.weight"),
        ({"start": -5}, "adversary.start"),
        ({"lecam": 0}, "adversary.lecam"),
        ({"lecam_decay": 1.0}, "adversary.lecam_decay"),
        ({"discriminator": "patchgan"}, "adversary.discriminator"),
        ({"discriminator": {"width": 8}}, "needs a name"),
        ({"wieght": 1}, "did you mean 'weight'"),
    ],
)
def test_values_of_an_adversary_that_cannot_be_meant(adversary, told):
    with pytest.raises(ConfigError, match=told):
        check(JUDGED | {"adversary": {"discriminator": {"name": "patchgan"}} | adversary}, "test")


def test_a_mistake_in_a_late_stage_shows_before_the_first(photos, tmp_path):  # noqa: F811
    stages = [
        {"name": "one", "train": {"steps": 1}},
        {"name": "two", "train": {"steps": 1}, "adversary": {"discriminator": {"name": "patchgan", "layers": 5}}},
    ]
    with pytest.raises(ConfigError, match=r"at least 96, and data\.size is 32"):
        train(check(JUDGED | {"stages": stages}, "test"), photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_from_a_file_is_judged_anew(photos, tmp_path):  # noqa: F811
    """Weights as authors publish them, without a discriminator: fine-tuning builds a fresh one."""
    published = tmp_path / "published"
    torch.manual_seed(0)
    vistok.create("vqgan-tiny").save(published)
    judged = JUDGED | {"model": {"init": str(published)}, "perceptual": {"name": "steerable"}}
    judged |= {"adversary": {"discriminator": {"name": "patchgan", "layers": 2, "width": 8}}}
    left = vistok.load(str(train(check(judged, "fine-tuning"), photos, tmp_path / "run")))
    before = vistok.load(str(published))
    moved = (left.decoder.cnn.last_layer - before.decoder.cnn.last_layer).abs().max()
    assert 0 < moved < 0.01
    assert left.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optimizer.lrr=1"], "did you mean 'lr'"),
        (["optimizer.lr=-1"], "greater than 0"),
        (["train.batch_size=.nan"], "train.batch_size"),
        (["loss.pixel=.inf"], "finite"),
        (["model.init=nowhere"], "name"),
    ],
)
def test_the_command_refuses_a_recipe_before_it_writes(arguments, told, photos, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    assert main(["train", "strata/tiny", "--data", str(photos), "-o", str(run), *arguments]) != 0
    assert told in " ".join(capsys.readouterr().err.split())
    assert not run.exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_the_command_refuses_data_without_pictures(kind, tmp_path, capsys):
    data = tmp_path / "data"
    if kind != "missing":
        data.mkdir()
    if kind == "text":
        (data / "notes.txt").write_text("no picture")
    assert main(["train", "strata/tiny", "--data", str(data), "-o", str(tmp_path / "run")]) != 0
    assert "data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_ends_with_1_where_a_loss_is_not_a_number_and_names_it(photos, tmp_path, capsys):  # noqa: F811
    import yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make(model={"broken_at": 9}).plain()))
    assert main(["train", str(recipe), "--data", str(photos), "-o", str(tmp_path / "run")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "commitment" in told
    assert "the checkpoint of step 8 is kept" in told
    assert vistok.load(str(tmp_path / "run" / "model")).steps_seen == 8


def test_the_command_refuses_to_resume_a_run_of_another_recipe(photos, tmp_path, capsys):  # noqa: F811
    import yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make(steps=2).plain()))
    arguments = ["train", str(recipe), "--data", str(photos), "-o", str(tmp_path / "run")]
    assert main(arguments) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([*arguments, "--resume", "optimizer.lr=0.5"]) != 0
    assert "optimizer.lr is 0.01 there and 0.5 here" in " ".join(capsys.readouterr().err.split())
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
