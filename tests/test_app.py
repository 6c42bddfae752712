"""What the page does, function by function, and the page itself in a headless browser, with real clicks."""

import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok import app
from vistok.errors import InputError
from vistok.tokens import Tokens

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


def test_edits_stay_within_segments(folder):
    model = vistok.load(str(folder / "model"))
    tokens = model.encode(Image.open(folder / "photo.png"))
    for edit in app.EDITS:
        changed = app.edited(tokens, edit)
        start = 0
        for segment in tokens.segments:
            before, after = (part.codes[0, start : start + segment.count] for part in (tokens, changed))
            start += segment.count
            assert set(after.tolist()) <= set(before.tolist())
            if edit in ("shuffle", "swap halves"):
                assert sorted(after.tolist()) == sorted(before.tolist())
            if edit == "repeat the first":
                assert set(after.tolist()) == {int(before[0])}
            if edit == "mean picture":
                assert len(set(after.tolist())) == 1
    assert torch.equal(app.edited(tokens, "shuffle", 3).codes, app.edited(tokens, "shuffle", 3).codes)
    assert isinstance(app.edited(tokens, "shuffle"), Tokens)


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
