"""Measuring reconstructions of clips: numbers against a computation by hand, prefixes, what is skipped."""

import pytest
import torch

import tests.toy  # noqa: F401
import vistok
from tests.data.moving import clips, cut_short
from vistok.data.video import read_clip
from vistok.errors import InputError
from vistok.evaluation.clips import evaluate_clips
from vistok.metrics.fvd import VIDEO_EXTRACTORS, VideoExtractor, fvd
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import ssim
from vistok.nn.i3d import I3D


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


def test_frechet_video_distance_over_sixteen_frames_each(tmp_path, monkeypatch):
    """17 and 33 frames: one clip of sixteen and two; the windows of 3 frames cross their bounds."""
    monkeypatch.setattr(I3D, "forward", lambda self, x, names: {"logits": x.flatten(3).mean(3).flatten(1)})
    extractor = VideoExtractor("i3d:stylegan-v", I3D(classes=1), VIDEO_EXTRACTORS["i3d:stylegan-v"], 16)
    root, model = clips(tmp_path / "c", [17, 33]), vistok.create("toy-video")
    found = evaluate_clips(model, root, fvd=extractor)
    whole = [read_clip(root / f"{name}.mp4")[0] for name in ("00", "01")]
    rebuilt = [model.decode(model.encode(clip), dtype=torch.uint8) for clip in whole]
    cut = [torch.cat([a[:, :, :16], b[:, :, :16], b[:, :, 16:32]]) for a, b in (whole, rebuilt)]
    assert found.prefixes[0].fvd == pytest.approx(fvd(cut[1], cut[0], extractor), rel=1e-6)
    (receipt,) = [one for one in found.receipts() if one.metric == "fvd"]
    assert (receipt.protocol["samples"], receipt.protocol["frames"]) == (3, 16)
    assert receipt.protocol["extractor weights"] == extractor.hash
    assert {one.metric for one in found.receipts()} == {"psnr", "ssim", "fvd"}
    assert found.reference != evaluate_clips(model, root, size=16).reference
    (root / "01.mp4").unlink()
    with pytest.raises(InputError, match="1 clips of 16 frames"):
        evaluate_clips(model, root, fvd=extractor)
