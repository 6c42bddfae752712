"""Generators in the trainer: their tokenizer is attached, held-out loss and samples are written, runs resume."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.errors import ConfigError, MismatchError
from vistok.registry import system_of
from vistok.training.prepare import config_of
from vistok.training.recipe import FOLDER, check, load_recipe
from vistok.training.trainer import train

PAIRS = {
    "fqgan-far-tiny": "fqgan-tiny",
    "tokenbridge-generator-tiny": "tokenbridge-tiny",
    "binary-latent-diffusion-generator-tiny": "binary-latent-diffusion-tiny",
    "titok-generator-tiny": "titok-tiny-vq",
    "var-generator-tiny": "var-tiny",
    "maskbit-tiny": "maskbit-tokenizer-tiny",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for name in ("bird", "cat"):
        (folder / name).mkdir()
        for index in range(12):
            small = random.randint(0, 256, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(small).resize((36, 32), Image.Resampling.BICUBIC).save(folder / name / f"{index}.png")
    return folder


def recipe(model, steps=4, **changes):
    return check(
        {
            "model": model,
            "data": {"size": 32, "workers": 0, "validation": 2},
            "optimizer": {"lr": 1e-3},
            "train": {
                "steps": steps,
                "batch_size": 4,
                "log_every": 2,
                "checkpoint_every": 2,
                "validate_every": 2,
                "sample_every": 4,
                "ema": 0.9,
                "threads": 1,
                "tensorboard": False,
            }
            | changes,
        },
        "test",
    )


@pytest.mark.parametrize("name", PAIRS)
def test_a_run_of_a_generator(name, photos, tmp_path):
    torch.manual_seed(0)
    tok = vistok.create(PAIRS[name])
    tok.save(tmp_path / "tok")
    model = {"name": name, "tokenizer": str(tmp_path / "tok")}
    folder = train(recipe(model), photos, tmp_path / "run")
    trained = vistok.load(folder)
    assert trained.config.tokenizer.weights == tok.fingerprint
    assert vistok.load(tmp_path / "tok").decode(trained.generate([0, 1])).shape == (2, 3, 32, 32)
    rows = list(csv.DictReader((tmp_path / "run" / "validation.csv").open()))
    assert [int(row["step"]) for row in rows] == [2, 4]
    assert float(rows[-1]["loss"]) > 0
    assert Image.open(tmp_path / "run" / "samples" / "step-00000004.png").size == (8 * 34, 2 * 34)


@pytest.mark.parametrize("slug", ["fqgan", "tokenbridge", "binary-latent-diffusion", "var", "maskgit"])
def test_a_tokenizer_then_its_generator_in_one_recipe(slug, photos, tmp_path):
    small = ["train.steps=2", "train.batch_size=4", "data.validation=2", "data.workers=0", "stages.0.train.steps=2"]
    found = load_recipe(f"{slug}/generator-tiny", [*small, "train.tensorboard=false"])
    trained = vistok.load(train(found, photos, tmp_path / "run"))
    (tokenizer,) = (vistok.load(tmp_path / "run" / "stages" / stage.name) for stage, _ in found.resolved()[:1])
    assert trained.config.tokenizer.weights == tokenizer.fingerprint
    assert tokenizer.decode(trained.generate([0, 1])).shape == (2, 3, 32, 32)
    assert train(found, photos, tmp_path / "run", resume=True).exists()


def test_a_resumed_run_ends_in_the_same_bits(photos, tmp_path):
    torch.manual_seed(0)
    vistok.create("fqgan-tiny").save(tmp_path / "tok")
    model = {"name": "fqgan-far-tiny", "tokenizer": str(tmp_path / "tok")}
    whole = vistok.load(train(recipe(model), photos, tmp_path / "a"))

    class Stop(Exception):
        pass

    from vistok.generators.fqgan import FAR

    original, calls = FAR.loss, []

    def stopping(self, batch, step, rng):
        calls.append(step)
        if step == 3:
            raise Stop
        return original(self, batch, step, rng)

    FAR.loss = stopping
    try:
        with pytest.raises(Stop):
            train(recipe(model), photos, tmp_path / "b")
    finally:
        FAR.loss = original
    again = vistok.load(train(recipe(model), photos, tmp_path / "b", resume=True))
    assert again.fingerprint == whole.fingerprint


def test_what_a_recipe_of_a_generator_must_say(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        train(recipe({"name": "fqgan-far-tiny"}), photos, tmp_path / "run")
    vistok.create("tokenbridge-tiny").save(tmp_path / "tok")
    with pytest.raises(MismatchError, match="codes of 64"):
        train(recipe({"name": "fqgan-far-tiny", "tokenizer": str(tmp_path / "tok")}), photos, tmp_path / "run")
    with pytest.raises(ConfigError, match="for generators"):
        train(recipe({"name": "fqgan-tiny", "tokenizer": "vqgan-tiny"}), photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_without_what_a_generator_learns_with_leave_no_run_behind(photos, tmp_path):
    vistok.create("fqgan-tiny").save(tmp_path / "tok")
    model = {"name": "fqgan-far-tiny", "tokenizer": str(tmp_path / "tok")}
    with pytest.raises(ConfigError, match="bird has no labels"):
        train(recipe(model), photos / "bird", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"2 classes and fqgan-far-tiny knows 1: model\.classes=2"):
        train(recipe(model | {"classes": 1}), photos, tmp_path / "run")
    vistok.create("titok-tiny-vq").save(tmp_path / "titok")
    with pytest.raises(ConfigError, match="no captions"):
        train(recipe({"name": "maskgen-tiny-vq", "tokenizer": str(tmp_path / "titok")}), photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


SLUGS = ("fqgan", "tokenbridge", "binary-latent-diffusion", "titok")
RECIPES = [path for slug in SLUGS for path in sorted((FOLDER / slug).glob("*.yaml"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_names_a_model_that_takes_it(path):
    found = load_recipe(f"{path.parent.name}/{path.stem}")
    made = {}
    for stage, held in found.resolved():
        if held.model.name is None:
            continue
        with torch.device("meta"):
            made[stage.name] = model = system_of(held.model.name)[0].model(config_of(held.model))
        if model.role != "generator":
            assert model.spec.sizes.legal((held.data.size, held.data.size))
            continue
        tokenizer = made.get(held.teachers.get("tokenizer", ""))
        if tokenizer is None:
            assert held.model.tokenizer
            with torch.device("meta"):
                tokenizer = vistok.create(held.model.tokenizer)
        assert model.spec.segments == tokenizer.spec.at(model.spec.size).segments
    assert model.system == path.parent.name
