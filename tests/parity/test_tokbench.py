"""TokBench's tables and string comparisons are the official script's."""

import json
from dataclasses import asdict

import pytest

from tests.parity.cases import Case, parametrize
from vistok.evaluation.tokbench import FaceInstance, TextInstance, score_faces, score_text
from vistok.metrics.text import reading


def percent(values) -> list[str]:
    return [f"{100 * value:.2f}%" for value in values]


@parametrize("tokbench", kinds=("text-strings",))
def test_strings(case: Case) -> None:
    held = json.loads((case.path / "io.json").read_text())
    found = [asdict(reading(pair["gt"], pair["pred"])) | {"label_length": len(pair["gt"])} for pair in held["pairs"]]
    for name, wanted in held["per_pair"].items():
        assert [float(one[name]) for one in found] == pytest.approx(wanted, abs=1e-9), name
    for name, wanted in held["summary"].items():
        mean = sum(float(one[name]) for one in found) / len(found)
        assert (1 - mean if name.endswith("_ned") else mean) == pytest.approx(wanted, abs=1e-9), name


@parametrize("tokbench", kinds=("bins",))
def test_tables(case: Case) -> None:
    held, setting = json.loads((case.path / "io.json").read_text()), case.config["setting"]
    words = [TextInstance(**one) for rows in held["text"].values() for one in rows]
    text = score_text(words, setting)
    row = held["expected"]["text"]["row"][2:]
    assert [*percent(text["t-acc"].bins), *percent([text["t-acc"].mean])] == row[: len(row) // 2]
    assert [*percent(text["t-ned"].bins), *percent([text["t-ned"].mean])] == row[len(row) // 2 :]
    faces = score_faces([FaceInstance(**one) for one in held["face"]], setting)["f-sim"]
    assert [*percent(faces.bins), *percent([faces.mean])] == held["expected"]["face"]["row"][2:]
    printed = " ".join(held["expected"]["printed"])
    for value in (text["t-acc"].overall, text["t-ned"].overall, faces.overall):
        assert f"{100 * value:.2f}%" in printed
    wanted = [f"({low}" for low in text["t-acc"].edges[:-1]]
    assert all(edge in name for edge, name in zip(wanted, held["expected"]["text"]["header"][2:], strict=False))
