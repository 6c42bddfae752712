"""Generators trained on token stores: the same loss as from pixels, whose tokens they are, and what does not fit."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests.training.test_bad_input import main
from tests.training.test_generators import recipe
from vistok.data.sources import open_source
from vistok.errors import ConfigError, FormatError, InputError, MismatchError
from vistok.scale.encode import EncodeOptions, encode_source
from vistok.training.recipe import check
from vistok.training.trainer import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for name in ("bird", "cat"):
        (folder / name).mkdir()
        for index in range(12):
            small = random.randint(0, 256, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(folder / name / f"{index}.png")
    return folder


def make_store(photos, folder, name) -> tuple[Path, vistok.tokenizer.Tokenizer]:
    torch.manual_seed(0)
    tok = vistok.create(name)
    tok.save(folder / f"{name}-model")
    encode_source(open_source(photos), tok, folder / name, EncodeOptions(batch_size=8, workers=0))
    return folder / name, tok


@pytest.fixture(scope="module")
def stored(photos, tmp_path_factory):
    """A store of TiTok's codes, its tokenizer, and the folder of both."""
    folder = tmp_path_factory.mktemp("stores")
    return (*make_store(photos, folder, "titok-tiny-vq"), folder)


def test_a_store_teaches_what_the_pixels_would(stored, photos, tmp_path):
    """Centre crops of the right size: the loss of a held-out row is that of the picture it was made from."""
    store, tok, folder = stored
    model = {"name": "titok-generator-tiny", "tokenizer": str(folder / "titok-tiny-vq-model")}
    left = vistok.load(train(recipe(model), store, tmp_path / "run"))
    assert left.config.tokenizer.weights == tok.fingerprint
    rows = list(csv.DictReader((tmp_path / "run" / "validation.csv").open()))
    train(recipe(model), photos, tmp_path / "pixels")
    others = list(csv.DictReader((tmp_path / "pixels" / "validation.csv").open()))
    assert float(rows[0]["loss"]) == pytest.approx(float(others[0]["loss"]), rel=0.05)
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()
    assert left.class_names == ()
    assert train(recipe(model), store, tmp_path / "run", resume=True).exists()


def test_without_its_tokenizer_it_is_known_by_the_store(stored, tmp_path):
    store, tok, _ = stored
    left = vistok.load(train(recipe({"name": "titok-generator-tiny"}), store, tmp_path / "run"))
    assert left.source.weights == tok.fingerprint
    assert not list((tmp_path / "run" / "samples").glob("*"))
    assert tok.decode(left.generate([0])).shape == (1, 3, 32, 32)


def test_vectors_and_captions_teach_too(photos, tmp_path, monkeypatch):
    from vistok.nn.clip_text import TextFeatures

    monkeypatch.setattr(
        "vistok.generators.titok.clip_text_condition",
        lambda texts, device: TextFeatures(torch.ones(len(texts), 5, 12), torch.ones(len(texts), 12)),
    )
    random = np.random.RandomState(0)
    folder = tmp_path / "captioned"
    folder.mkdir()
    import io
    import tarfile

    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(12):
            buffer = io.BytesIO()
            Image.fromarray(random.randint(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "png")
            for name, content in ((f"{number}.png", buffer.getvalue()), (f"{number}.txt", b"a picture")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    store, tok = make_store(folder, tmp_path, "titok-tiny-vae")
    left = vistok.load(train(recipe({"name": "maskgen-tiny-kl"}), store, tmp_path / "run"))
    assert left.source.weights == tok.fingerprint
    model = {"name": "maskgen-tiny-kl", "tokenizer": str(tmp_path / "titok-tiny-vae-model")}
    train(recipe(model), folder, tmp_path / "pixels")
    assert (tmp_path / "pixels" / "samples" / "step-00000004.png").exists()


@pytest.fixture(scope="module")
def another(photos, tmp_path_factory):
    """A store with the same layout, by other weights."""
    folder = tmp_path_factory.mktemp("another")
    torch.manual_seed(7)
    tok = vistok.create("titok-tiny-vq")
    encode_source(open_source(photos), tok, folder / "store", EncodeOptions(batch_size=8, workers=0))
    return folder / "store"


def test_a_store_of_another_tokenizer_is_refused_before_anything_is_written(stored, another, tmp_path, capsys):
    _, _, folder = stored
    model = {"name": "titok-generator-tiny", "tokenizer": str(folder / "titok-tiny-vq-model")}
    with pytest.raises(MismatchError, match=r"were made by 'titok-tiny-vq' .* was made for 'titok-tiny-vq'"):
        train(recipe(model), another, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    arguments = ["stages=[]", f"model.tokenizer={folder / 'titok-tiny-vq-model'}", "model.tokens=8"]
    arguments += ["model.codebook_size=64", "train.steps=1", "train.batch_size=4"]
    run = ["train", "titok/generator-tiny", "--data", str(another), "-o", str(tmp_path / "run")]
    assert main([*run, *arguments]) != 0
    assert "were made by" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_layout_is_refused(stored, tmp_path):
    with pytest.raises(MismatchError, match="takes tokens of sequence 9 "):
        train(recipe({"name": "titok-generator-tiny", "tokens": 9}), stored[0], tmp_path / "run")
    with pytest.raises(MismatchError, match="takes tokens of grid 8x8"):
        train(recipe({"name": "fqgan-far-tiny"}), stored[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_trains_generators_alone(stored, photos, tmp_path, capsys):
    store = stored[0]
    with pytest.raises(ConfigError, match=r"trains generators; titok-tiny-vq learns"):
        train(recipe({"name": "titok-tiny-vq"}), store, tmp_path / "run")
    stages = [{"name": "tokenizer", "model": {"name": "titok-tiny-vq"}}, {"name": "generator"}]
    plain = recipe({"name": "titok-generator-tiny"}).plain() | {"stages": stages}
    with pytest.raises(ConfigError, match=r"stages=\[\] leaves the generator"):
        train(check(plain, "test"), store, tmp_path / "run")
    mixed = recipe({"name": "titok-generator-tiny"}).plain()
    mixed["data"]["validation"] = str(photos)
    with pytest.raises(InputError, match="validation"):
        train(check(mixed, "test"), store, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert main(["eval", "-m", "strata", "--data", str(store)]) != 0
    assert "token store" in capsys.readouterr().err


def test_an_unfinished_store_is_refused(stored, tmp_path):
    import json
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(stored[0], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(FormatError, match="not finished"):
        train(recipe({"name": "titok-generator-tiny"}), copy, tmp_path / "run")
    assert not (tmp_path / "run").exists()
