import numpy as np
import pytest
import torch

import vistok
from tests import toy  # noqa: F401
from tests.data.pictures import folder, picture
from vistok.data.sources import open_source
from vistok.errors import InputError, MismatchError
from vistok.evaluation.protocols import evaluation_crop
from vistok.evaluation.receipt import compare
from vistok.evaluation.reconstruction import evaluate, prefix_lengths
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import ssim
from vistok.pixels import from_pil


def strata() -> vistok.Tokenizer:
    torch.manual_seed(0)
    return vistok.create("strata-tiny")


def test_numbers_are_those_of_each_picture(tmp_path) -> None:
    folder(tmp_path / "p", 3, (24, 32))
    tokenizer = vistok.create("toy")
    found = evaluate(tokenizer, tmp_path / "p", size=0)
    pixels = torch.cat([from_pil(picture(number, (24, 32))) for number in range(3)])
    rebuilt = tokenizer.decode(tokenizer.encode(pixels), dtype=torch.uint8)
    (row,) = found.prefixes
    assert row.psnr == pytest.approx(psnr(rebuilt, pixels).mean().item())
    assert row.psnr_deviation == pytest.approx(psnr(rebuilt, pixels).std(correction=0).item())
    assert row.ssim == pytest.approx(ssim(rebuilt, pixels).mean().item())
    assert row.ms_ssim is None
    assert row.tokens == 48
    assert row.bits_per_pixel == 48 * 9 / (24 * 32)
    assert [(book.column, book.size, book.counted) for book in found.codebooks] == [(c, 8, 144) for c in range(3)]
    assert found.images == 3
    assert found.protocol["crop"].startswith("none")
    assert found.images_per_second > 0


def test_every_prefix_and_one_alone(tmp_path) -> None:
    folder(tmp_path / "p", 2, (70, 64))
    found = evaluate(strata(), tmp_path / "p", size=64)
    spec = strata().spec.at((64, 64))
    assert [row.tokens for row in found.prefixes] == list(spec.prefixes)
    assert found.prefixes[-1].bits_per_pixel == spec.bits / 64**2
    assert [book.segment for book in found.codebooks] == [segment.name for segment in spec.segments]
    length = spec.prefixes[0]
    alone = evaluate(strata(), tmp_path / "p", size=64, length=length)
    assert [row.tokens for row in alone.prefixes] == [length]
    assert alone.prefixes[0].psnr == pytest.approx(found.prefixes[0].psnr, abs=1e-6)
    with pytest.raises(InputError, match="fewer than 999"):
        evaluate(strata(), tmp_path / "p", size=64, length=999)
    with pytest.raises(InputError, match="do not decode on their own"):
        evaluate(strata(), tmp_path / "p", size=64, length=length + 1)


def test_mixed_sizes_whole(tmp_path) -> None:
    folder(tmp_path / "p", 2, (40, 64))
    folder(tmp_path / "p", 1, (64, 33), start=2)
    found = evaluate(strata(), open_source(tmp_path / "p"), size=0)
    wide, tall = strata().spec.at((64, 64)), strata().spec.at((64, 64))
    assert found.prefixes[-1].tokens == pytest.approx((2 * wide.length + tall.length) / 3)
    expected = (2 * wide.bits / (40 * 64) + tall.bits / (64 * 33)) / 3
    assert found.prefixes[-1].bits_per_pixel == pytest.approx(expected)


def test_bad_pictures_are_skipped_and_counted(tmp_path) -> None:
    folder(tmp_path / "p", 4)
    (tmp_path / "p" / "0001.png").write_bytes(b"not a picture")
    steps: list[tuple[int, int]] = []
    found = evaluate(vistok.create("toy"), tmp_path / "p", size=16, progress=lambda *done: steps.append(done))
    assert found.images == 3
    assert list(found.skipped) == ["0001.png"]
    assert steps[-1] == (4, 1)
    for name in ("0000", "0002", "0003"):
        (tmp_path / "p" / f"{name}.png").write_bytes(b"")
    with pytest.raises(InputError, match="not one of the 4 pictures"):
        evaluate(vistok.create("toy"), tmp_path / "p", size=16)


def test_crops_copy_pixels_and_scale_only_what_is_too_small(tmp_path) -> None:
    large = picture(0, (21, 30))
    np.testing.assert_array_equal(evaluation_crop(large, 16), np.asarray(large)[2:18, 7:23])
    assert evaluation_crop(picture(0, (10, 30)), 16).shape == (16, 16, 3)
    folder(tmp_path / "p", 2, (12, 12))
    folder(tmp_path / "p", 1, (20, 20), start=2)
    found = evaluate(vistok.create("toy"), tmp_path / "p", size=16)
    assert found.protocol["resize"].startswith("2 of 3 smaller pictures")


def test_a_model_of_one_size_is_measured_at_that_size(tmp_path) -> None:
    folder(tmp_path / "p", 2, (20, 20))
    assert evaluate(vistok.create("toy-16"), tmp_path / "p").protocol["crop"] == "centre crop of 16 x 16 pixels"


def test_prefix_lengths() -> None:
    def spec(count: int, rule: str) -> TokenSpec:
        return TokenSpec((16, 16), lambda _: (Segment("s", (count,), (8,)),), Sizes(multiple=16), rule)  # type: ignore

    assert prefix_lengths(spec(256, "any")) == [2, 4, 8, 16, 32, 64, 128, 256]
    assert prefix_lengths(spec(100, "any")) == [1, 2, 4, 7, 13, 25, 50, 100]
    assert prefix_lengths(spec(3, "any")) == [1, 2, 3]
    assert prefix_lengths(spec(1, "any")) == [1]
    assert prefix_lengths(spec(256, "none")) == [256]


def test_masks_have_an_iou(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    model = vistok.create("himtok-tiny")
    for index in range(2):
        grid = np.zeros((32, 32), np.uint8)
        grid[4 : 20 + index, 8:24] = 255
        Image.fromarray(grid).save(tmp_path / f"{index}.png")
    found = evaluate(model, tmp_path, size=0, length=8)
    masks = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / f"{i}.png")))[None] for i in range(2)])
    rebuilt = model.decode(model.encode(masks), dtype=torch.uint8)
    wanted = ((rebuilt >= 128) & (masks >= 128)).sum((1, 2, 3)) / ((rebuilt >= 128) | (masks >= 128)).sum((1, 2, 3))
    assert found.prefixes[0].iou == pytest.approx(float(wanted.double().mean()), abs=1e-6)


def test_clip_score_of_the_pictures_that_have_captions(tmp_path) -> None:
    pytest.importorskip("transformers")
    from tests.metrics.test_clip_score import tiny_clip
    from vistok.metrics.clip_score import build_clip_score

    folder(tmp_path / "p", 3)
    judge, tokenizer = build_clip_score(str(tiny_clip(tmp_path / "tiny"))), vistok.create("toy")
    with pytest.raises(InputError, match="has no captions"):
        evaluate(tokenizer, tmp_path / "p", size=0, clip=judge)
    captions = ["a dark sea", "two bears"]
    for number, caption in enumerate(captions):
        (tmp_path / "p" / f"{number:04d}.txt").write_text(caption)
    found = evaluate(tokenizer, tmp_path / "p", size=0, clip=judge)
    pixels = torch.cat([from_pil(picture(number)) for number in range(2)])
    rebuilt = tokenizer.decode(tokenizer.encode(pixels), dtype=torch.uint8)
    assert found.images == 3
    assert found.prefixes[0].clip_score == pytest.approx(judge(rebuilt, captions).mean().item(), rel=1e-5)
    assert found.originals["clip_score"] == pytest.approx(judge(pixels, captions).mean().item(), rel=1e-5)
    (receipt,) = [one for one in found.receipts() if one.metric == "clip_score"]
    assert receipt.protocol["samples"] == 2, "the third has no caption"
    assert receipt.protocol["extractor weights"] == judge.hash
    assert receipt.protocol["crop"] == found.protocol["crop"]
    (tmp_path / "p" / "0000.txt").write_text("another")
    (other,) = [
        one for one in evaluate(tokenizer, tmp_path / "p", size=0, clip=judge).receipts() if one.metric == "clip_score"
    ]
    with pytest.raises(MismatchError, match="captions"):
        compare(receipt, other)
