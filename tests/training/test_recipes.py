"""Recipes that come with the package: whole, and those of VQGAN, TiTok and One-D-Piece run from end to end."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.losses.discriminators import build_discriminator
from vistok.losses.perceptual import PERCEPTUALS
from vistok.training.prepare import build_model, config_of
from vistok.training.recipe import FOLDER, load_recipe
from vistok.training.trainer import train

NAMES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_names_what_there_is(name):
    for _, recipe in load_recipe(name).resolved():
        if recipe.model.name is not None:
            config_of(recipe.model)
        if recipe.perceptual is not None:
            assert recipe.perceptual.name in PERCEPTUALS
        if recipe.adversary is not None:
            options = dict(recipe.adversary.discriminator)
            with torch.device("meta"):
                kind = options.pop("name")
                if kind != "dino":  # whose backbone is not here
                    assert build_discriminator(kind, **options) is not None


@pytest.mark.parametrize("name", ["vqgan/tiny", "titok/tiny", "one-d-piece/tiny"])
def test_tiny_recipes_need_nothing_from_elsewhere(name):
    recipe = load_recipe(name)
    earlier: set[str] = set()
    for stage, held in recipe.resolved():
        assert held.model.init is None
        assert set(held.teachers.values()) <= earlier
        assert held.perceptual is None or held.perceptual.name == "steerable"
        build_model(held.model)
        earlier.add(stage.name)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for index in range(12):
        small = random.randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


def columns(run: Path) -> list[dict[str, str]]:
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


SHORT = ["train.steps=2", "train.batch_size=2", "train.log_every=1", "data.validation=0", "train.tensorboard=false"]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["titok", "one-d-piece"])
def test_two_stages_and_their_teacher(name, photos, tmp_path, one_thread):
    stages = ["stages.1.train.steps=2", "stages.2.train.steps=2", "stages.2.adversary.start=1"]
    looks = ["data.validation=1", "train.validate_every=2", "train.sample_every=4"]
    recipe = load_recipe(f"{name}/tiny", [*SHORT, *stages, *looks])
    model = train(recipe, photos, tmp_path / "run")
    validation = (tmp_path / "run" / "validation.csv").read_text()
    assert len(validation.splitlines()) == 4  # also in the first stage, whose codes the teacher decodes
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
    rows = columns(tmp_path / "run")
    assert [bool(row["proxy"]) for row in rows] == [False, False, True, True, False, False]
    assert [float(row["discriminator_loss"] or 0) > 0 for row in rows] == [False] * 5 + [True]
    trained = vistok.load(model)
    first, teacher = (vistok.load(tmp_path / "run" / "stages" / stage) for stage in ("proxy", "teacher"))
    assert torch.equal(trained.quantizer.codebook, first.quantizer.codebook)  # frozen in the second stage
    ours, theirs = trained.decoder.pixels.state_dict(), teacher.decoder.cnn.state_dict()
    assert all(torch.allclose(ours[key], theirs[key], atol=0.02) for key in theirs)  # where it began, two steps on
    pictures = torch.rand(1, 3, 32, 32)
    tokens = trained.encode(pictures)
    assert trained.decode(tokens).shape == pictures.shape
    assert trained.spec.prefix_rule == ("any" if name == "one-d-piece" else "none")


def test_vqgan_with_both_judges(photos, tmp_path, one_thread):
    recipe = load_recipe("vqgan/tiny", [*SHORT, "adversary.start=1"])
    train(recipe, photos, tmp_path / "run")
    rows = columns(tmp_path / "run")
    assert all(float(row["perceptual"]) > 0 for row in rows)
    assert float(rows[1]["discriminator_loss"]) > 0
    assert float(rows[1]["adaptive_weight"]) > 0
