"""Protocols cut and round as they say, distances and receipts come out of `evaluate`, and differences are explained."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests import toy  # noqa: F401
from tests.data.pictures import folder
from vistok.errors import ConfigError, FormatError, InputError, MismatchError, UnknownNameError
from vistok.evaluation.explain import explain, ladder
from vistok.evaluation.protocols import PROTOCOLS, Protocol, adm_crop, find_protocol
from vistok.evaluation.receipt import Receipt, compare, differences, plain, read
from vistok.evaluation.reconstruction import evaluate
from vistok.metrics.extractors import Extractor, Way
from vistok.metrics.frechet import frechet_distance


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    where = tmp_path_factory.mktemp("pictures")
    folder(where, 10, (48, 40))
    return where


class Small(torch.nn.Module):
    """A network of Inception's feature names that takes no time."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 12, 5, 3)

    def forward(self, x, names):
        maps = self.conv(x)
        found = {
            "2048": maps.relu().mean((2, 3)),
            "spatial": maps[:, 0].flatten(1),
            "logits_unbiased": maps.amax((2, 3)),
        }
        return {name: found[name] for name in names}


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    network = Small()
    way = Way("tensorflow", 16, (128.0,) * 3, (128.0,) * 3)
    return Extractor("inception:torch-fidelity", network, way, network, ("2048", "spatial", "logits_unbiased"))


def test_roundings():
    decoded = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 254.9 / 255, 1.0])
    assert Protocol().eight_bit(decoded).tolist() == [0, 0, 1, 255, 255]
    assert PROTOCOLS["1d-tokenizer"].eight_bit(decoded).tolist() == [0, 0, 0, 254, 255]
    assert PROTOCOLS["llamagen"].eight_bit(decoded).tolist() == [0, 0, 1, 255, 255]
    original = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(Protocol().original(original), original)
    lost = original.int() - PROTOCOLS["seed-voken"].original(original).int()
    assert set(lost.tolist()) == {0, 1}, "the way through [-1, 1] costs many originals a level"


def test_adm_crop_halves_by_means():
    picture = np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3)
    halved = np.asarray(Image.fromarray(picture).resize((48, 32), Image.Resampling.BOX))
    assert np.array_equal(adm_crop(Image.fromarray(picture), 32), halved[:, 8:40])
    assert adm_crop(Image.fromarray(picture), 40).shape == (40, 40, 3)


def test_names_and_changes():
    changed = find_protocol("vistok", rounding="cut-off")
    assert changed == dataclasses.replace(Protocol(), rounding="cut-off", name="vistok (rounding=cut-off)")
    assert find_protocol("adm", crop="adm") is PROTOCOLS["adm"]
    with pytest.raises(UnknownNameError, match="llamagen"):
        find_protocol("lamagen")
    with pytest.raises(ConfigError, match="nearest"):
        find_protocol("vistok", rounding="nearst")


def test_distances_are_those_of_all_pictures(pictures, extractor):
    tokenizer = vistok.create("toy")
    found = evaluate(tokenizer, pictures, size=32, extractor=extractor, metrics=("fid", "sfid", "is", "kid", "recall"))
    (row,) = found.prefixes
    assert list(row.distances) == ["fid", "sfid", "is", "kid", "recall"]
    cuts = [np.asarray(Image.open(path).convert("RGB").crop((4, 8, 36, 40))) for path in sorted(pictures.iterdir())]
    pixels = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2)
    rebuilt = tokenizer.decode(tokenizer.encode(pixels), dtype=torch.uint8)
    wanted = frechet_distance(extractor(rebuilt)["2048"], extractor(pixels)["2048"])
    assert row.distances["fid"] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UnknownNameError, match="fid"):
        evaluate(tokenizer, pictures, size=32, extractor=extractor, metrics=("fdi",))


def test_receipts_say_all_and_refuse_other_protocols(pictures, extractor):
    tokenizer = vistok.create("toy")
    ours = evaluate(tokenizer, pictures, size=32, extractor=extractor)
    again = evaluate(tokenizer, pictures, size=32, extractor=extractor)
    theirs = evaluate(tokenizer, pictures, size=32, protocol="1d-tokenizer")
    by_name = {receipt.metric: receipt for receipt in ours.receipts()}
    assert by_name.keys() == {"psnr", "ssim", "fid"}
    assert by_name["psnr"].protocol["samples"] == 10
    assert by_name["fid"].protocol["extractor weights"] == extractor.hash
    assert by_name["psnr"].model["weights"] == tokenizer.fingerprint
    for one, other in zip(ours.receipts(), again.receipts(), strict=True):
        assert compare(one, other) == pytest.approx(0, abs=1e-9)
    with pytest.raises(MismatchError, match=r"rounding.*reference"):
        compare(by_name["psnr"], theirs.receipts()[0])
    with pytest.raises(MismatchError, match="not the same metric"):
        compare(by_name["psnr"], by_name["ssim"])


def test_explaining(tmp_path, pictures):
    tokenizer = vistok.create("toy")
    files = []
    for name in ("vistok", "1d-tokenizer"):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(evaluate(tokenizer, pictures, size=32, protocol=name).plain()))
    a, b = (read(file) for file in files)
    psnr = explain(a, b)[0]
    assert [term.term for term in psnr.terms] == ["resize", "rounding", "reference", "name"]
    assert [term.known for term in psnr.terms if term.term == "name"] == [""], "a protocol's name is no model's"
    assert not psnr.comparable
    assert all(one.comparable and not one.terms for one in explain(a, a))
    rungs = ladder(tokenizer, pictures, PROTOCOLS["vistok"], PROTOCOLS["1d-tokenizer"], size=32)
    assert [rung.term for rung in rungs] == ["", "crop", "rounding"]
    assert rungs[0].values["psnr"] == pytest.approx(a[0].value)
    assert rungs[-1].values["psnr"] == pytest.approx(b[0].value)


def test_receipts_of_other_files(tmp_path):
    receipt = Receipt("psnr", 20.0, {"variant": "each"}, {"name": "a", "weights": "0"})
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"receipts": plain([receipt])}))
    assert read(path) == [receipt]
    other = dataclasses.replace(receipt, seed=1, environment={"torch": "2"})
    assert [(one.kind, one.term) for one in differences(receipt, other)] == [
        ("settings", "seed"),
        ("environment", "torch"),
    ]
    with pytest.raises(InputError, match="no metric in common"):
        explain([receipt], [dataclasses.replace(receipt, metric="ssim")])
    for text, told in (("{}", "no receipts"), ("[1", "no JSON"), ('{"receipts": [{"metric": "psnr"}]}', "damaged")):
        path.write_text(text)
        with pytest.raises(FormatError, match=told):
            read(path)
    path.write_text(json.dumps({"receipts": [], "receipts_version": 99}))
    with pytest.raises(FormatError, match="upgrade"):
        read(path)
