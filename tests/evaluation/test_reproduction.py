"""Rules and verdicts of reproductions, on numbers made up for the purpose."""

import math

import pytest

from vistok.errors import ConfigError, FormatError, UnknownNameError
from vistok.evaluation.reproduction import (
    Arm,
    Condition,
    Reproduction,
    difference,
    find,
    judged,
    names,
    of,
    ratio,
    read_result,
)


def never(seed, context):
    raise AssertionError("a verdict runs nothing")


def make(*rule, seeds_of_short=None) -> Reproduction:
    return Reproduction(
        slug="fake", title="Fake", claim="ours is better", source="nowhere", checked="numbers", baseline="theirs",
        arms={
            "ours": Arm("ours", never, 1),
            "theirs": Arm("theirs", never, 1),
            "short": Arm("ours, shorter", never, 1, steps=5, seeds=seeds_of_short),
        },
        rule=rule, steps=10, batch=4, report=("mse",),
    )  # fmt: skip


NUMBERS = {
    "ours": {0: {"mse": 0.9, "psnr": 21.0}, 1: {"mse": 0.8, "psnr": 22.0}},
    "theirs": {0: {"mse": 1.0, "psnr": 20.0}, 1: {"mse": 1.0, "psnr": 20.5}},
    "short": {0: {"mse": 2.0, "psnr": 18.0}},
}


@pytest.mark.parametrize(
    ("condition", "values", "holds"),
    [
        (Condition("", ratio("mse", "ours", over="theirs"), at_most=0.95), [0.9, 0.8], True),
        (Condition("", ratio("mse", "ours", over="theirs"), at_most=0.85), [0.9, 0.8], False),  # one seed is not enough
        (Condition("", difference("psnr", "ours", minus="theirs"), at_least=1.0), [1.0, 1.5], True),
        (Condition("", difference("psnr", "ours", minus="theirs"), at_least=1.2), [1.0, 1.5], False),
        (Condition("", of("ours", "psnr"), at_least=20, at_most=21.5), [21.0, 22.0], False),
        (
            Condition("", ratio("mse", "short", over="ours"), at_least=2.0),
            [2.0 / 0.9],
            True,
        ),  # of the seeds that it ran
    ],
)
def test_a_condition_holds_for_every_seed_or_not_at_all(condition, values, holds):
    found = judged(make(condition), NUMBERS)
    assert found["rule"][0]["values"] == pytest.approx(values)
    assert found["rule"][0]["holds"] is holds
    assert found["verdict"] == ("shown" if holds else "not shown")


def test_one_condition_that_fails_is_enough():
    good = Condition("", of("ours", "mse"), at_most=1.0)
    bad = Condition("", of("ours", "mse"), at_least=1.0)
    assert judged(make(good, good), NUMBERS)["verdict"] == "shown"
    assert judged(make(good, bad), NUMBERS)["verdict"] == "not shown"


def test_nan_and_missing_numbers_show_nothing():
    condition = Condition("", ratio("mse", "ours", over="theirs"), at_most=0.95)
    broken = NUMBERS | {"ours": {0: {"mse": math.nan}, 1: {"mse": 0.8}}}
    assert judged(make(condition), broken)["verdict"] == "not shown"
    assert judged(make(condition), {"theirs": NUMBERS["theirs"]})["verdict"] == "not shown"


def test_ratios_to_the_baseline_with_their_spread():
    found = judged(make(Condition("", of("ours", "mse"))), NUMBERS)["arms"]
    ratios = found["ours"]["ratios"]["mse"]
    assert ratios.pop("of_seeds") == pytest.approx([0.9, 0.8])
    assert ratios == pytest.approx({"mean": 0.85, "low": 0.8, "high": 0.9})
    assert found["short"]["steps"] == 5
    assert found["short"]["seeds"] == [0]
    assert found["theirs"]["numbers"]["psnr"]["high"] == 20.5


def test_arms_run_seed_by_seed():
    rule = Condition("", of("ours", "mse"))
    assert make(rule, seeds_of_short=1).runs(2) == [
        (0, "ours"), (0, "theirs"), (0, "short"), (1, "ours"), (1, "theirs"),
    ]  # fmt: skip


def test_a_rule_names_arms_that_are_there():
    with pytest.raises(ConfigError, match="arms that are not there: \\['nobody'\\]"):
        make(Condition("", of("nobody", "mse")))
    with pytest.raises(ConfigError, match="has a rule"):
        make()


def test_limits_in_words():
    assert Condition("", of("ours", "mse"), at_least=0.5).limits == "at least 0.5"
    assert Condition("", of("ours", "mse"), at_most=2).limits == "at most 2"
    assert Condition("", of("ours", "mse"), 0.5, 2).limits == "at least 0.5, at most 2"


@pytest.mark.parametrize("slug", names())
def test_every_reproduction_is_whole(slug):
    found = find(slug)
    assert found.slug == slug
    assert found.baseline in found.arms
    assert all(condition.text for condition in found.rule)


def test_an_unknown_one_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'titok'"):
        find("titk")


def test_foreign_result_files_are_refused():
    with pytest.raises(FormatError, match=r"x\.json is not the result"):
        read_result('{"verdict": "shown"}', "x.json")
    with pytest.raises(FormatError, match="newer"):
        read_result('{"version": 99, "verdict": "shown", "rule": [], "arms": {}}', "x.json")
