"""Measuring reconstructions of clips: numbers against a computation by hand, prefixes, what is skipped."""

import pytest
import torch

import tests.toy  # noqa: F401
import vistok
from tests.data.moving import clips, cut_short
from vistok.data.video import read_clip
from vistok.errors import InputError
from vistok.evaluation.clips import evaluate_clips
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import ssim


def test_numbers_are_means_over_frames(tmp_path):
    root = clips(tmp_path / "c", [7, 5, 3])
    cut_short(root / "01.mp4")
    model = vistok.create("toy-video")
    seen: list[tuple[int, int]] = []
    found = evaluate_clips(model, root, progress=lambda done, bad: seen.append((done, bad)))
    assert seen == [(1, 0), (2, 1), (3, 1)]
    assert (found.clips, found.frames, found.seconds, list(found.skipped)) == (2, 10, pytest.approx(1.0), ["01.mp4"])
    values, likeness, bits = [], [], 0
    for name in ("00", "02"):
        pixels = read_clip(root / f"{name}.mp4")[0]
        tokens = model.encode(pixels)
        ours, theirs = (x[0].transpose(0, 1) for x in (model.decode(tokens, dtype=torch.uint8), pixels))
        values.append(psnr(ours, theirs))
        likeness.append(ssim(ours, theirs))
        bits += int(tokens.bits()[0])
    row = found.prefixes[0]
    assert row.psnr == pytest.approx(float(torch.cat(values).mean()))
    assert row.psnr_worst == pytest.approx(float(torch.cat(values).min()))
    assert row.ssim == pytest.approx(float(torch.cat(likeness).mean()))
    assert row.bits_per_frame == pytest.approx(bits / 10)
    assert row.bits_per_second == pytest.approx(bits)
    assert row.bits_per_pixel == pytest.approx(bits / 10 / (32 * 48))
    assert row.share == 1
    assert sum(book.counted for book in found.codebooks) == 3 * (2 * 96 + 1 * 96 + 2 * 96 * 2 + 96)
    assert found.plain()["prefixes"][0]["psnr"] == row.psnr


def test_crops_and_mistakes(tmp_path):
    root = clips(tmp_path / "c", [5], size=(40, 64))
    model = vistok.create("toy-video")
    found = evaluate_clips(model, root, size=16)
    assert found.prefixes[0].bits_per_frame == pytest.approx(found.prefixes[0].bits_per_pixel * 256)
    with pytest.raises(InputError, match="do not decode on their own"):
        evaluate_clips(model, root, length=3)
    with pytest.raises(InputError, match="needs a tokenizer of clips"):
        evaluate_clips(vistok.create("toy"), root)
    (root / "00.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="not one of the 1 clips"):
        evaluate_clips(model, root)
