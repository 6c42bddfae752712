"""The result of a reproduction on a docs page: made of its result file, not run yet where there is none."""

import importlib.util
import json
from pathlib import Path

import pytest

from vistok.evaluation.reproduction import VERSION, Arm, Condition, Reproduction, judged, of, ratio

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "reproductions").mkdir()
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    return module


def write(folder: Path, most: float) -> None:
    fake = Reproduction(
        slug="my-system", title="Mine", claim="ours is better", source="section 3", checked="small pictures",
        baseline="theirs",
        arms={"ours": Arm("ours", print, 1), "theirs": Arm("theirs", print, 1, steps=7)},
        rule=(
            Condition("error", ratio("mse", "ours", over="theirs"), at_most=most),
            Condition("psnr", of("ours", "psnr"), at_least=1),
        ),
        steps=5, batch=4, report=("mse", "psnr"),
    )  # fmt: skip
    numbers = {
        "ours": {0: {"mse": 0.5, "psnr": 20.0}, 1: {"mse": 0.7, "psnr": 21.0}},
        "theirs": {0: {"mse": 1.0}, 1: {"mse": 1.0}},
    }
    environment = {"device": "a processor", "torch": "2"}
    result = {"version": VERSION, **fake.plan(), "seeds": 2, **judged(fake, numbers), "environment": environment}
    for arm in result["arms"].values():
        arm["spent"] = [{"processor_seconds": 60.0}, {"processor_seconds": 120.0}]
    (folder / "my_system.json").write_text(json.dumps(result))


def test_a_page_shows_verdict_numbers_and_rule(tables, tmp_path):
    page = "before\n<!-- reproduction-my-system -->\nstale words\n<!-- /reproduction-my-system -->\nafter"
    assert "Not run yet: `vistok reproduce my-system`." in tables.filled(page)
    write(tmp_path / "reproductions", most=0.8)
    told = tables.filled(page)
    for part in (
        "**Shown**: ours is better (section 3).",
        "| mse | 0.6 (0.5 to 0.7), 0.6x | 1 (1 to 1) |",
        "| psnr | 20.5 (20 to 21) |  |",
        "| error | at most 0.8 | 0.5, 0.7 | yes |",
        "theirs: theirs, 7 steps",
        "6 minutes of one core (a processor, torch 2)",
    ):
        assert part in told
    assert "stale words" not in told
    assert tables.filled(told) == told
    write(tmp_path / "reproductions", most=0.6)
    assert "**Not shown**: ours is better" in tables.filled(page)
    assert "| error | at most 0.6 | 0.5, 0.7 | no |" in tables.filled(page)


def test_a_table_that_is_not_there(tables):
    with pytest.raises(SystemExit, match="no table 'speeed'; there are systems"):
        tables.filled("<!-- speeed -->\n<!-- /speeed -->")


def test_a_table_as_its_benchmark_wrote_it(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "<!-- files-kodak -->\nstale\n<!-- /files-kodak -->"
    assert "Not run yet." in tables.filled(page)
    found = {"command": "python benchmarks/files.py", "machine": "a processor", "weights": "0123456789abcdef"}
    (tmp_path / "files-kodak.json").write_text(json.dumps(found))
    (tmp_path / "files-kodak.md").write_text("| PSNR |\n| --- |\n| 30 |\n")
    told = tables.filled(page)
    assert "| 30 |\n\n`python benchmarks/files.py`, a processor, weights 01234567." in told
    assert "stale" not in told
