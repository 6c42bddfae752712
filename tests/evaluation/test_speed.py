"""The speed board: rates that follow from times, and numbers that cannot be."""

import json
import time

import pytest
import torch

import vistok
from tests.cli.test_eval import run
from vistok.errors import InputError
from vistok.evaluation.speed import speed


class Slow(torch.nn.Module):
    """Takes a set time for each picture and pixel, or the same for all."""

    def __init__(self, inner, honest):
        super().__init__()
        self.inner, self.honest = inner, honest

    def forward(self, x):
        time.sleep(1e-4 * x.shape[0] * x.shape[-1] ** 2 if self.honest else 0.2)
        return self.inner(x)


def slow(honest):
    torch.manual_seed(0)
    model = vistok.create("vq-vae-tiny")
    model.encoder = Slow(model.encoder, honest)
    return model


def test_rates_follow_from_times():
    one, four = speed(slow(True), size=32, batches=(4, 1), dtypes=(torch.float32,), repeats=2)
    assert (one.batch, four.batch) == (1, 4)
    for row in (one, four):
        assert row.encode_images < 1 / (1e-4 * 32**2) * 1.01
        assert row.encode_megapixels == pytest.approx(row.encode_images * 32**2 / 1e6)
        assert row.encode_tokens == pytest.approx(row.encode_images * 64)
        assert row.memory_mb is None or row.memory_mb >= 0
    assert not one.doubts
    assert not any("encoding" in doubt for doubt in four.doubts)


def test_times_that_do_not_grow_are_doubted():
    one, four = speed(slow(False), size=32, batches=(1, 4), dtypes=(torch.float32,), repeats=2)
    assert any("four times the pixels" in doubt for doubt in one.doubts)
    assert any("encoding 4 pictures took hardly longer than 1" in doubt for doubt in four.doubts)


def test_bad_settings():
    with pytest.raises(InputError):
        speed(vistok.create("titok-tiny"), size=33)
    with pytest.raises(InputError, match="repeats"):
        speed(vistok.create("vq-vae-tiny"), repeats=0)


def test_command(capsys, tmp_path):
    vistok.create("vq-vae-tiny").save(tmp_path / "model")
    words = ["bench", "speed", "-m", tmp_path / "model", "--size", 32]
    assert "tokens/s" in run(capsys, *words).out
    rows = json.loads(run(capsys, *words, "--json").out)["rows"]
    assert [(row["dtype"], row["batch"]) for row in rows] == [
        ("float32", 1),
        ("float32", 8),
        ("bfloat16", 1),
        ("bfloat16", 8),
    ]
