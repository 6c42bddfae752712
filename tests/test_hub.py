"""Model folders and the Hub's conventions: what is saved loads, damage and newer versions say so, old ones load."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import vistok
from tests import toy  # noqa: F401  (registers the toy system)
from vistok import hub
from vistok.errors import ConfigError, FormatError, UnknownNameError
from vistok.tokenizers.strata import Strata

SAMPLE = Path(__file__).parent / "samples" / "model-v1"


@pytest.fixture
def folder(tmp_path):
    vistok.create("toy").save(tmp_path / "toy")
    return tmp_path / "toy"


def change(folder: Path, **fields) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | fields))


def test_a_folder_of_version_1_keeps_loading():
    tok = vistok.load(SAMPLE)
    assert tok.fingerprint == "bb184531c4817465c406fb300995b26b"
    pixels = torch.arange(3 * 64 * 64).reshape(1, 3, 64, 64).remainder(251).to(torch.uint8)
    tokens = tok.encode(pixels)
    assert tokens.codes[0].tolist() == [
        0,
        7,
        5,
        5,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        7,
        3,
        7,
        0,
        0,
        0,
        0,
        0,
        0,
        3,
        0,
        0,
        0,
        0,
        0,
        0,
        3,
        0,
        3,
    ]
    out = tok.decode(tokens)
    assert out.mean().item() == pytest.approx(0.525545, abs=1e-4)


def test_the_hub_mixins_own_verbs(folder, tmp_path):
    tok = vistok.load(folder)
    tok.save_pretrained(tmp_path / "again")
    again = type(tok).from_pretrained(str(tmp_path / "again"))
    assert again.fingerprint == tok.fingerprint
    assert Strata.from_pretrained(SAMPLE).config.levels[0].scale == 2
    assert {path.name for path in (tmp_path / "again").iterdir()} >= {"config.json", "model.safetensors"}
    with pytest.raises(TypeError, match="holds a Toy, not a Strata"):
        Strata.from_pretrained(str(tmp_path / "again"))


def test_a_hub_id_is_fetched_at_its_revision(folder, monkeypatch):
    asked = []

    def download(repo, revision=None, allow_patterns=None, local_files_only=False):
        asked.append((repo, revision, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert vistok.load("someone/model@abc123").fingerprint == vistok.load(folder).fingerprint
    vistok.load("someone/model", revision="v2")
    assert [(repo, revision) for repo, revision, _ in asked] == [("someone/model", "abc123"), ("someone/model", "v2")]
    assert set(asked[0][2]) == {"model.safetensors", "config.json"}


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(vistok.VistokError, match=r"check the name and the network.*model.safetensors"):
        vistok.load("someone/model")


def test_unknown_names_and_missing_folders(tmp_path):
    with pytest.raises(UnknownNameError, match="strata"):
        vistok.load("stratta")
    with pytest.raises(UnknownNameError, match=r"vistok.create\('toy'\)"):
        vistok.load("toy")
    with pytest.raises(UnknownNameError, match="no model folder"):
        vistok.load(str(tmp_path / "nothing" / "here"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"config.json does not exist"):
        vistok.load(tmp_path / "empty")


def test_newer_and_damaged_folders(folder, tmp_path):
    for fields, told in (({"vistok": 99}, "upgrade"), ({"config": {"levls": 3}}, "'levels'")):
        broken = tmp_path / told.strip("'")
        shutil.copytree(folder, broken)
        change(broken, **fields)
        with pytest.raises((FormatError, ConfigError), match=told):
            vistok.load(broken)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        vistok.load(folder)


def test_every_flipped_byte_of_the_weights_is_noticed(folder):
    data = bytearray((folder / hub.WEIGHTS).read_bytes())
    for position in range(len(data) - 4, len(data)):  # the tensor itself; the header is safetensors' own to check
        data[position] ^= 1
        (folder / hub.WEIGHTS).write_bytes(data)
        with pytest.raises(FormatError, match="damaged"):
            vistok.load(folder)
        data[position] ^= 1
