"""What the page does, function by function, and the page itself in a headless browser, with real clicks."""

import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok import app
from vistok.edits import position_at, with_token
from vistok.errors import InputError

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("app")
    vistok.create("strata-tiny").save(where / "model")
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((96, 64), Image.Resampling.BICUBIC)
    smooth.save(where / "photo.png")
    return where


def test_rebuilding(folder):
    name, image = str(folder / "model"), Image.open(folder / "photo.png")
    whole, few = app.rebuild(name, image), app.rebuild(name, image, 0.01)
    assert whole.picture.shape == whole.difference.shape == whole.map.shape == (64, 96, 3)
    model = vistok.load(name)
    wanted = model.decode(model.encode(image), dtype=torch.uint8)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(whole.picture, wanted)
    lengths = model.spec.at(model.encode(image).canvas[0].coded).prefixes
    assert f"{lengths[-1]} of {lengths[-1]} tokens" in whole.told
    assert f"{lengths[0]} of {lengths[-1]} tokens" in few.told
    with pytest.raises(InputError, match="no edit"):
        app.rebuild(name, image, edit="explode")


def test_a_click_on_the_map_names_a_token(folder):
    name, image = str(folder / "model"), Image.open(folder / "photo.png")
    tokens = vistok.load(name).encode(image)
    assert app.picked(name, image, 1.0, 40, 50) == position_at(tokens, (64, 96), 40, 50)
    few = tokens.prefix(int(vistok.load(name).spec.at(tokens.canvas[0].coded).prefixes[0]))
    assert app.picked(name, image, 0.01, 40, 50) == position_at(few, (64, 96), 40, 50) < few.length


def test_which_pixels_follow_a_token(folder):
    name, image = str(folder / "model"), Image.open(folder / "photo.png")
    model = vistok.load(name)
    tokens = model.encode(image)
    found = app.change_token(name, image, tokens.length - 1, "randomise", seed=3)
    after = with_token(tokens, tokens.length - 1, "randomise", seed=3)
    pictures = [model.decode(one, dtype=torch.uint8)[0].permute(1, 2, 0).numpy().astype(int) for one in (tokens, after)]
    gap = np.abs(pictures[1] - pictures[0]).max(2)
    assert np.array_equal(found.picture, pictures[1])
    assert gap.max() > 0
    assert np.array_equal(found.where[..., 0] > 0, gap * 255 // gap.max() > 0)
    assert found.where.max() == 255
    assert f"{(gap > 0).mean():.1%} of the pixels change" in found.told
    assert f"code {int(tokens.codes[0, -1])} to {int(after.codes[0, -1])}" in found.told
    same = app.change_token(name, image, 0, "set", value=int(tokens.codes[0, 0]))
    assert "no pixel changes" in same.told
    assert not same.where.any()
    few = app.change_token(name, image, 0, "randomise", share=0.01)
    assert few.picture.shape == (64, 96, 3)
    with pytest.raises(InputError, match="no token"):
        app.change_token(name, image, tokens.length - 1, share=0.01)


def test_large_pictures():
    assert max(app.prepared(Image.new("L", (3000, 1000))).size) == app.SHOWN
    with pytest.raises(InputError, match="too large"):
        app.prepared(Image.new("1", (9000, 9000)))


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_page_with_real_clicks(folder):
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = app.serve([str(folder / "model")], port=port, block=False)
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.set_default_timeout(180_000)
            tab.goto(f"http://127.0.0.1:{port}")
            tab.set_input_files("#photograph input[type=file]", str(folder / "photo.png"))
            tab.wait_for_selector("#told strong")
            whole = tab.inner_text("#told p")
            assert "PSNR" in whole
            tab.wait_for_selector("#rebuilt img")
            tab.click("#edit label:has-text('shuffle')")
            tab.wait_for_function(
                "old => !['', old].includes(document.querySelector('#told p')?.innerText ?? '')", arg=whole
            )
            shuffled = tab.inner_text("#told p")
            assert shuffled.split("PSNR")[0] == whole.split("PSNR")[0]
            assert shuffled != whole
            tab.click("#change")
            tab.wait_for_selector("#touched strong")
            first = tab.inner_text("#touched p")
            assert first.startswith("token 0")
            tab.wait_for_selector("#where img")
            tab.locator("#map img").click(position={"x": 3, "y": 3})
            tab.wait_for_function("old => document.querySelector('#touched p')?.innerText !== old", arg=first)
            clicked = tab.inner_text("#touched p")
            tokens = vistok.load(str(folder / "model")).encode(Image.open(folder / "photo.png"))
            assert clicked.startswith(f"token {position_at(tokens, (64, 96), 0, 0)},"), "the map's first corner"
            browser.close()
    finally:
        page.close()


def test_a_port_in_use(folder):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="--port"):
            app.serve([str(folder / "model")], port=taken.getsockname()[1], block=False)
