import re

import pytest
import torch
from PIL import Image

import vistok

pytest.importorskip("skimage")
from examples.demo import Training, rebuild, tiles
from examples.report import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = vistok.create("strata-tiny")
    curve = [(float(step), 20.0 + step / 100) for step in range(10, 110, 10)]
    grid = Image.new("RGB", (80, 40), "teal")
    training = Training("strata/tiny", 12.5, 100, 36_952, curve, {"psnr": curve, "psnr@4": curve}, grid, grid, 10)
    photograph = rebuild(tokenizer, "chelsea.png")
    path = write_report(tmp_path_factory.mktemp("demo") / "report.html", tokenizer, [photograph], training, 30.0)
    return photograph, path.read_text(encoding="utf-8")


def test_a_photograph_at_every_prefix_beside_codecs_of_the_same_bytes(report):
    photograph, _ = report
    assert photograph.pixels.shape == (1, 3, 300, 451)
    assert len(photograph.rebuilt) == 3
    for part in photograph.rebuilt:
        assert part.pixels.shape == photograph.pixels.shape
        assert part.bytes * 8 >= part.bits_per_pixel * 300 * 451
        for coded in part.codecs.values():
            assert coded.bytes <= part.bytes or not coded.fits


def test_the_report_stands_alone(report):
    _, html = report
    assert html.count("data:image/webp;base64,") >= 10
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "$" not in re.sub(r"base64,[^\"]+", "", html)
    for said in ("Chelsea the cat", "WebP", "JPEG", "strata-tiny", "100 steps in 12", "prefers-color-scheme"):
        assert said in html


def test_squares(tmp_path):
    folder = tiles(["chelsea.png"], tmp_path / "squares")
    files = sorted(folder.iterdir())
    assert len(files) == 12
    assert {Image.open(file).size for file in files} == {(96, 96)}
