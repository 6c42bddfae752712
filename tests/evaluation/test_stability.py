"""Codes that flip are counted where they flip, and the batch-invariant mode has none."""

import json

import pytest
import torch

import vistok
from tests.cli.test_eval import run
from tests.data.pictures import folder
from vistok.errors import InputError
from vistok.evaluation.stability import stability


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    where = tmp_path_factory.mktemp("pictures")
    folder(where, 8, (64, 64))
    return where


class Shaky(torch.nn.Module):
    """An encoder whose result depends on the batch, as kernels' does, only more."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.05 * len(x)


def test_flips_of_a_batch_are_counted_and_the_invariant_mode_has_none(pictures):
    torch.manual_seed(0)
    tokenizer = vistok.create("vq-vae-tiny")
    tokenizer.encoder = Shaky(tokenizer.encoder)
    found = {row.setting: row for row in stability(tokenizer, pictures, size=32, batches=(2, 4)).rows}
    assert found["alone again"].codes == found["batch-invariant, in another order"].codes == 0
    assert 0 < found["batches of 2"].codes <= found["batches of 2"].pictures
    assert found["batches of 4"].codes > 0
    assert found["bfloat16"].codes > 0


def test_segments_and_tiles(pictures):
    torch.manual_seed(0)
    strata = stability(vistok.create("strata-tiny"), pictures, size=64, batches=(4,))
    assert set(strata.rows[0].by_segment) == {"level0", "level1", "level2"}
    titok = vistok.create("titok-tiny")
    rows = {row.setting: row for row in stability(titok, pictures, batches=(4,)).rows}
    assert rows["tiles of a larger picture"].codes < 0.05


def test_command(capsys, pictures, tmp_path):
    vistok.create("vq-vae-tiny").save(tmp_path / "model")
    words = ["eval", "--stability", "-m", tmp_path / "model", "--data", pictures, "--size", 32]
    assert "batches of 8" in run(capsys, *words).out
    document = json.loads(run(capsys, *words, "--json").out)
    assert document["pictures"] == 8
    assert document["invariant_cost"] > 0


def test_continuous_tokens(pictures):
    from tests import toy  # noqa: F401

    with pytest.raises(InputError, match="continuous"):
        stability(vistok.create("titok-tiny-vae"), pictures)
