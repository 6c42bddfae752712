from math import ceil

import pytest
import torch

import vistok
from tests.data.pictures import picture
from vistok.compressed import compress
from vistok.errors import InputError
from vistok.evaluation.codecs import encode_within
from vistok.evaluation.rate_distortion import rate_distortion
from vistok.metrics.psnr import psnr
from vistok.pixels import from_pil


def test_rows_are_means_at_equal_bytes() -> None:
    torch.manual_seed(0)
    tokenizer = vistok.create("strata-tiny")
    images = [from_pil(picture(seed, (64, 64))) for seed in range(2)]
    steps: list[int] = []
    rows = rate_distortion(tokenizer, images, codecs=["jpeg", "webp"], progress=steps.append)
    prefixes = list(tokenizer.spec.at((64, 64)).prefixes)
    assert [(row.coder, row.tokens) for row in rows] == [(c, k) for k in prefixes for c in ("tokens", "jpeg", "webp")]
    assert steps == [1, 2]
    tokens = tokenizer.encode(torch.cat(images)).prefix(prefixes[1])
    ours, _, webp = rows[3:6]
    assert ours.bpp == int(tokens.bits()[0]) / 64**2
    files = [len(compress(tokenizer, image, length=prefixes[1])) for image in images]
    assert ours.file_bpp == pytest.approx(8 * sum(files) / 2 / 64**2)
    assert webp.file_bpp is None
    rebuilt = tokenizer.decode(tokens, dtype=torch.uint8)
    assert ours.psnr == pytest.approx(psnr(rebuilt, torch.cat(images)).mean().item(), abs=1e-3)
    budget = ceil(int(tokens.bits()[0]) / 8)
    coded = [encode_within(image, "webp", budget) for image in images]
    assert webp.psnr == pytest.approx(sum(part.psnr for part in coded) / 2)
    assert webp.bpp == pytest.approx(sum(8 * part.bytes / 64**2 for part in coded) / 2)
    assert webp.too_large == sum(not part.fits for part in coded)
    assert all(row.encode_ms > 0 and row.decode_ms > 0 and row.pictures == 2 for row in rows)


def test_chosen_lengths_and_nothing_to_compare() -> None:
    tokenizer = vistok.create("strata-tiny")
    image = from_pil(picture(0, (64, 64)))
    rows = rate_distortion(tokenizer, [image], codecs=["jpeg"], lengths=[20])
    assert [row.tokens for row in rows] == [20, 20]
    with pytest.raises(InputError, match="no pictures"):
        rate_distortion(tokenizer, [])
