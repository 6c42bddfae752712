"""Recipes: what is refused, and how helpfully."""

from pathlib import Path

import pytest
import yaml

from vistok.errors import ConfigError, UnknownNameError
from vistok.training.recipe import FOLDER, check, differences, load_recipe

PLAIN = {
    "model": {"name": "pupil"},
    "data": {"size": 16},
    "optimizer": {"lr": 0.001},
    "train": {"steps": 10, "batch_size": 4},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(PLAIN))
    return file


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lrr=1", r"unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ("train.batchsize=1", r"did you mean 'batch_size'"),
        ("lr=1", r"did you mean 'optimizer.lr'"),
        ("trian.steps=1", r"unknown key 'trian'; did you mean 'train'"),
        ("optimizer.lr=-1", r"optimizer.lr: .*greater than 0"),
        ("optimizer.lr=.nan", r"optimizer.lr"),
        ("optimizer.lr=nan", r"optimizer.lr: .*finite"),
        ("optimizer.lr=.inf", r"optimizer.lr: .*finite"),
        ("train.steps=0", r"train.steps"),
        ("train.steps=2.5", r"train.steps"),
        ("train.ema=1.0", r"train.ema"),
        ("train.precision=fp8", r"train.precision: .*'bf16'"),
        ("data.crop=middle", r"data.crop"),
        ("loss.pixels=-1", r"loss.pixels"),
        ("model.init=x", r"either name .* or init"),
        ("version=2", r"newer"),
        ("train", r"section.key=value"),
        ("train.steps.more=1", r"not a section|nothing to set"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(path, override, told):
    with pytest.raises(ConfigError, match=told):
        load_recipe(path, [override])


def test_overrides_are_laid_over_the_file(path):
    recipe = load_recipe(path, ["optimizer.lr=1e-2", "train.ema=null", "model.width=4", "data.scale=[0.5, 1]"])
    assert recipe.optimizer.lr == 0.01
    assert recipe.train.ema is None
    assert recipe.model.changes == {"width": 4}
    assert recipe.data.scale == (0.5, 1.0)


def test_a_missing_section_is_named(path):
    path.write_text(yaml.safe_dump({key: value for key, value in PLAIN.items() if key != "optimizer"}))
    with pytest.raises(ConfigError, match="optimizer is missing"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", ""])
def test_what_is_not_a_mapping_is_refused(path, text):
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_recipe(path)


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="no recipe 'nothing/tiny'"):
        load_recipe("nothing/tiny")


def test_stages_lay_their_changes_over_the_recipe():
    stages = [
        {"name": "all", "train": {"steps": 3}},
        {"name": "decoder", "freeze": ["encoder"], "optimizer": {"lr": 0.1}, "train": {"steps": 4, "batch_size": 2}},
    ]
    recipe = check(PLAIN | {"stages": stages}, "recipe")
    (first, one), (second, two) = recipe.resolved()
    assert (first.name, one.train.steps, one.optimizer.lr) == ("all", 3, 0.001)
    assert (second.freeze, two.train.steps, two.train.batch_size, two.optimizer.lr) == (("encoder",), 4, 2, 0.1)
    assert recipe.total_steps == 7


@pytest.mark.parametrize(
    ("stage", "told"),
    [({"optimizer": {"lrr": 1}}, "lrr"), ({"train": {"seed": 1}}, "steps, batch_size"), ({"frez": []}, "'freeze'")],
)
def test_a_wrong_key_in_a_stage_is_refused(path, stage, told):
    path.write_text(yaml.safe_dump(PLAIN | {"stages": [{"name": "one"} | stage]}))
    with pytest.raises(ConfigError, match=told):
        load_recipe(path)


def test_differences_name_what_changed():
    there = check(PLAIN, "a").plain()
    here = check(PLAIN | {"optimizer": {"lr": 0.01}}, "b").plain()
    assert differences(there, there) == []
    assert differences(there, here) == ["optimizer.lr is 0.001 there and 0.01 here"]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_recipe_of_the_package_is_valid_and_names_a_model(file):
    from vistok.registry import system_of

    recipe = load_recipe(f"{file.parent.name}/{file.stem}")
    assert recipe.model.name is None or system_of(recipe.model.name)
