"""Codebook usage over an epoch: the numbers of all codes that occurred in it, whoever interrupts the run."""

import pytest
import torch

from tests.training.test_trainer import interrupted, photos, rows  # noqa: F401
from vistok.quantize.usage import CodeUsage
from vistok.training.recipe import check
from vistok.training.trainer import train


def make(name: str, **train_section):
    return check(
        {
            "model": {"name": name},
            "data": {"size": 32, "workers": 0, "validation": 2},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 13, "batch_size": 4, "log_every": 5, "checkpoint_every": 4, "validate_every": 0,
                      "sample_every": 0, "tensorboard": False, "threads": 1} | train_section,
        },
        "test",
    )  # fmt: skip


def test_an_epoch_counts_every_code_once(photos, tmp_path, monkeypatch):  # noqa: F811
    seen: list[torch.Tensor] = []
    original = CodeUsage.update

    def update(self, codes):
        seen.append(codes.clone())
        original(self, codes)

    monkeypatch.setattr(CodeUsage, "update", update)
    train(make("vqgan-tiny"), photos, tmp_path / "run")
    log = rows(tmp_path / "run" / "codebooks.csv")
    assert [(row["step"], row["epoch"]) for row in log] == [("6", "1"), ("11", "2")]  # 22 pictures, 4 a step
    assert len(seen) == 13
    for row, codes in zip(log, (seen[:6], seen[6:11]), strict=True):
        share = torch.cat(codes).flatten().bincount(minlength=64).double()
        share /= share.sum()
        assert float(row["used/quantizer"]) == pytest.approx((share > 0).double().mean().item())
        assert float(row["perplexity/quantizer"]) == pytest.approx(torch.special.entr(share).sum().exp().item())


def test_a_resumed_run_counts_on_where_it_was(photos, tmp_path, monkeypatch):  # noqa: F811
    train(make("vqgan-tiny"), photos, tmp_path / "whole")
    interrupted(make("vqgan-tiny"), photos, tmp_path / "killed", [3, 5, 9, 12], monkeypatch)
    whole, killed = ((tmp_path / name / "codebooks.csv").read_text() for name in ("whole", "killed"))
    assert whole == killed
    assert len(whole.splitlines()) == 3


def test_a_model_without_codebooks_writes_nothing(photos, tmp_path):  # noqa: F811
    train(make("titok-tiny-vae"), photos, tmp_path / "run")
    assert not (tmp_path / "run" / "codebooks.csv").exists()
