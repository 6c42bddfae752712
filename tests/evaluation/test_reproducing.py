"""Reproductions run: once, resumably, on data that is found or asked for, through the library's trainer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tests.training.pupil  # noqa: F401  registers a small tokenizer that trains
from vistok.errors import InputError, MismatchError, OutputError
from vistok.evaluation.reproducing import BESIDE, DATA, find_data, reproduce
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, of, ratio

calls: list[tuple[str, int]] = []


@pytest.fixture(autouse=True)
def forget():
    threads = torch.get_num_threads()
    calls.clear()
    yield
    torch.set_num_threads(threads)


def counted(name, value):
    def run(seed, context):
        calls.append((name, seed))
        assert context.steps == (7 if name == "theirs" else 5)
        return {"mse": value + 0.1 * seed}

    return run


def make(**changes) -> Reproduction:
    fields = {
        "slug": "fake", "title": "Fake", "claim": "ours is better", "source": "nowhere", "checked": "numbers",
        "baseline": "theirs", "steps": 5, "batch": 4, "report": ("mse",), "train": "set/train", "test": "set/test",
        "arms": {"ours": Arm("ours", counted("ours", 0.5), 1), "theirs": Arm("longer", counted("theirs", 1.0), 1, 7)},
        "rule": (Condition("error", ratio("mse", "ours", over="theirs"), at_most=0.6),),
    }  # fmt: skip
    return Reproduction(**(fields | changes))


@pytest.fixture(scope="module")
def where(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for half, count in (("train", 12), ("test", 6)):
        (root / "set" / half).mkdir(parents=True)
        for index in range(count):
            small = random.randint(0, 256, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC).save(root / "set" / half / f"{index}.png")
    return root


def test_every_arm_for_every_seed_and_a_result(where, tmp_path):
    found = make()
    result = reproduce(found, find_data(found, where), tmp_path / "run")
    assert calls == [("ours", 0), ("theirs", 0), ("ours", 1), ("theirs", 1)]
    assert result["verdict"] == "shown"
    written = json.loads((tmp_path / "run" / "fake.json").read_text())
    assert written["verdict"] == "shown"
    assert written["rule"][0]["values"] == pytest.approx([0.5, 0.6 / 1.1], rel=1e-5)
    assert written["data"]["train"]["items"] == 12
    assert written["environment"]["torch"] == torch.__version__
    assert [spent["wall_seconds"] >= 0 for spent in written["arms"]["ours"]["spent"]] == [True, True]
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["rule"][0]["limits"] == "at most 0.6"


def test_a_killed_run_goes_on(where, tmp_path):
    def broken(seed, context):
        if seed == 1:
            raise KeyboardInterrupt
        return counted("theirs", 1.0)(seed, context)

    found = make()
    data = find_data(found, where)
    weak = replace(found, arms=found.arms | {"theirs": Arm("longer", broken, 1, 7)})
    with pytest.raises(KeyboardInterrupt):
        reproduce(weak, data, tmp_path / "run")
    assert not (tmp_path / "run" / "fake.json").exists()
    calls.clear()
    result = reproduce(found, data, tmp_path / "run")
    assert calls == [("theirs", 1)]
    assert result["arms"]["theirs"]["numbers"]["mse"]["of_seeds"] == pytest.approx([1.0, 1.1])
    calls.clear()
    assert reproduce(found, data, tmp_path / "run", seeds=3)["seeds"] == 3
    assert calls == [("ours", 2), ("theirs", 2)]


def test_a_rule_cannot_change_after_the_first_arm(where, tmp_path):
    found = make()
    data = find_data(found, where)
    reproduce(found, data, tmp_path / "run")
    kinder = replace(found, rule=(replace(found.rule[0], at_most=0.9),))
    with pytest.raises(MismatchError, match=r"another plan \(rule differ\)"):
        reproduce(kinder, data, tmp_path / "run")
    with pytest.raises(MismatchError, match="another plan"):
        reproduce(replace(found, steps=6), data, tmp_path / "run")
    with pytest.raises(MismatchError, match="data"):
        reproduce(
            replace(found, test="set/train"), find_data(replace(found, test="set/train"), where), tmp_path / "run"
        )


def test_foreign_folders_and_too_few_seeds_are_refused(where, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    found = make()
    with pytest.raises(OutputError, match="holds no reproduction"):
        reproduce(found, find_data(found, where), tmp_path)
    with pytest.raises(InputError, match="at least two"):
        reproduce(found, find_data(found, where), tmp_path / "run", seeds=1)
    assert calls == []


def test_data_that_is_missing_is_named(where, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="lacks set/train and set/test, which the reproduction of fake"):
        find_data(make(), tmp_path)
    monkeypatch.setenv(DATA, str(where))
    assert len(find_data(make()).test) == 6
    monkeypatch.delenv(DATA)
    with pytest.raises(InputError, match="--data or"):
        find_data(make())
    assert BESIDE.parts[-2:] == ("shared", "data")


def test_numbers_that_are_not_finite_show_nothing(where, tmp_path):
    found = make(arms={name: Arm(name, lambda seed, context: {"mse": float("nan")}, 1) for name in ("ours", "theirs")})
    data = find_data(found, where)
    assert reproduce(found, data, tmp_path / "run")["verdict"] == "not shown"
    assert reproduce(found, data, tmp_path / "run")["verdict"] == "not shown"  # and so does what was read back


def small(codebook):
    def run(seed, context):
        rest = {"data": {"size": 16, "workers": 0}, "optimizer": {"lr": 0.01}}
        teacher = context.shared("teacher", {"model": {"name": "pupil"}, **rest}, steps=2)
        model = context.train({"model": {"name": "pupil", "codebook": codebook}, **rest})
        pixels, _ = context.test_pixels(16, 4)
        tokens = model.encode(pixels)
        assert not model.training
        assert teacher.fingerprint != model.fingerprint
        return {"mse": float((model.decode(tokens) - pixels / 255).square().mean())}

    return run


def test_arms_train_within_the_budget(where, tmp_path):
    arms = {"ours": Arm("16 codes", small(16), 1), "theirs": Arm("2 codes", small(2), 1)}
    found = make(arms=arms, rule=(Condition("error", of("ours", "mse"), at_most=1.0),), steps=3)
    result = reproduce(found, find_data(found, where), tmp_path / "run")
    run = tmp_path / "run" / "seed-1" / "ours" / "model"
    recipe = (run / "recipe.yaml").read_text()
    assert "seed: 1" in recipe
    assert "batch_size: 4" in recipe
    assert (run / "log.csv").read_text().splitlines()[-1].startswith("3,")
    assert (tmp_path / "run" / "shared" / "teacher" / "model").is_dir()
    assert result["verdict"] == "shown"
