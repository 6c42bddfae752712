"""`vistok reproduce`: what it says before anything runs."""

import json

import pytest

from tests.cli.test_main import run


def test_a_dry_run_shows_claim_rule_and_cost(capsys):
    code, out, _ = run(capsys, "reproduce", "one-d-piece", "--dry-run")
    assert code == 0
    for told in ("every prefix", "the baseline", "at least 1.5", "4 runs", "minutes on one core"):
        assert told in out


def test_a_dry_run_as_json(capsys):
    code, out, _ = run(capsys, "reproduce", "titok", "--dry-run", "--json", "--seeds", "3")
    assert code == 0
    plan = json.loads(out)
    assert plan["runs"] == 7  # two arms for three seeds, one for the first alone
    assert plan["rule"][0]["limits"] == "at most 0.95"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["titk"], "no reproduction of 'titk'; did you mean 'titok'"),
        (["titok", "--data", "nowhere"], "nowhere lacks cifar10/train.parquet and cifar10/test.parquet"),
        (["titok", "--seeds", "1"], "--seeds"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "reproduce", *words)
    assert code == 1
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
