"""The weights of vistok-progressive: how they are made of two runs, and those that ship."""

import json
from pathlib import Path

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import catalogue
from vistok.compressed import compress, decompress
from vistok.errors import MismatchError
from vistok.folder import WEIGHTS
from vistok.header import peek
from vistok.loading import SHIPPED
from vistok.tokenizers._progressive_export import codes_hash, export, write_sample
from vistok.tokenizers._progressive_prior import ExactConv, round_weights, sizes_table

NAME = "vistok-progressive"
SAMPLE = Path(__file__).parents[1] / "samples" / "progressive-shipped.vtk"
LARGEST = 12_000_000


def drawn(scale: float):
    """A tiny model with weights of its own and the transform that all have."""
    model = vistok.create(f"{NAME}-tiny")
    transform = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    draw_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    for part in (model.encoder, model.decoder):
        for name, buffer in transform.items():
            part.get_buffer(name).copy_(buffer)
    model.prior.table.copy_(sizes_table())
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    prior, decoder = drawn(1.0), drawn(0.7)
    prior.save(folder / "prior")
    decoder.save(folder / "decoder")
    return prior, decoder, export(folder / "prior", folder / "decoder", folder / "shipped"), folder


def test_the_folder_holds_one_part_of_each_run(made) -> None:
    prior, decoder, shipped, folder = made
    for name, part in shipped.prior.named_modules():
        if isinstance(part, ExactConv):
            assert torch.equal(part.weight, round_weights(prior.prior.get_submodule(name).weight))
    for name, parameter in shipped.decoder.named_parameters():
        assert torch.equal(parameter, decoder.decoder.get_parameter(name).half().float())
    parameters = sum(p.numel() for p in shipped.parameters())
    assert (folder / "shipped" / WEIGHTS).stat().st_size < 2.6 * parameters + 30_000


def test_the_folder_writes_the_streams_of_the_prior(made) -> None:
    prior, _, shipped, folder = made
    pixels = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = (model.stream.encode(pixels.float() / 255, segments=3).data for model in (shipped, prior))
    assert ours == theirs
    data = compress(shipped, pixels)
    assert torch.equal(decompress(vistok.load(str(folder / "shipped")), data), decompress(shipped, data))


def test_a_sample_says_what_it_must_decode_to(made, tmp_path) -> None:
    shipped, pixels = made[2], torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    write_sample(shipped, pixels, tmp_path / "a.vtk", 0.2)
    told = json.loads((tmp_path / "a.json").read_text())
    data = (tmp_path / "a.vtk").read_bytes()
    assert told == {"fingerprint": shipped.fingerprint, "bytes": len(data), "codes": codes_hash(shipped, data)}


def test_runs_of_different_transforms_are_not_joined(made, tmp_path) -> None:
    folder, other = made[3], drawn(0.7)
    other.encoder.transform.mean.add_(0.1)
    other.save(tmp_path / "other")
    with pytest.raises(MismatchError, match="transforms"):
        export(folder / "prior", tmp_path / "other", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# -- what ships --------------------------------------------------------------------------------------------------------

PACKAGED = any(file.package for variant in catalogue.variants() if variant.name == NAME for file in variant.weights)


@pytest.mark.skipif(not PACKAGED, reason="this version ships without these weights")
def test_the_shipped_weights_decode_the_committed_file_to_the_committed_hash() -> None:
    model = vistok.load(NAME)
    told, data = json.loads(SAMPLE.with_suffix(".json").read_text()), SAMPLE.read_bytes()
    assert model.fingerprint == told["fingerprint"]
    assert codes_hash(model, data) == told["codes"]  # whichever machine this is
    assert decompress(model, data).shape == (1, 3, 400, 600)
    assert peek(data).made_by(model.fingerprint)
    assert (SHIPPED / NAME / WEIGHTS).stat().st_size <= LARGEST
    part = decompress(model, data[:800], partial=True).float()
    assert float((part - decompress(model, data).float()).square().mean()) < 400  # a rough version of the same


@pytest.mark.skipif(not PACKAGED, reason="this version ships without these weights")
def test_what_ships_is_what_compress_uses() -> None:
    assert catalogue.DEFAULT_COMPRESSOR == NAME
