import xml.etree.ElementTree as ElementTree

import pytest

from vistok.evaluation.charts import Series, line_chart, log_ticks, standalone, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (17.3, 27.9, [16, 18, 20, 22, 24, 26, 28]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
        (3.0, 3.0, [3]),
    ],
)
def test_round_ticks_span_the_data(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_log_ticks() -> None:
    assert log_ticks(0.009, 0.3) == [0.01, 0.02, 0.05, 0.1, 0.2]


def test_a_chart_is_well_formed_and_in_order() -> None:
    lines = [Series("ours & theirs", [(0.01, 18), (0.1, 24), (0.2, 26)]), Series("<jpeg>", [(0.1, 20), (0.2, 24)])]
    root = ElementTree.fromstring(standalone(line_chart(lines, "bits per pixel", "PSNR, dB", log_x=True)))
    name = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{name}text")]
    assert {"ours & theirs", "<jpeg>", "bits per pixel", "PSNR, dB", "0.05"} <= set(texts)
    first = [(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in root.iter(f"{name}circle")][:3]
    assert first == sorted(first)
    assert [y for _, y in first] == sorted((y for _, y in first), reverse=True)


def test_nothing_to_draw() -> None:
    assert "no data" in line_chart([Series("empty", [])], "x", "y")
