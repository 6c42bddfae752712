"""Authors' checkpoints in and out: wrappers, recognition, published files, and all that may be wrong with them."""

import hashlib
import json
import os
import pickle
import sys
from collections import OrderedDict
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests import toy  # noqa: F401  (registers the toy system)
from vistok import catalogue, checkpoints
from vistok.catalogue import Variant, WeightFile
from vistok.errors import ConfigError, FormatError, InputError, MismatchError, OutputError, VistokError
from vistok.registry import find_system
from vistok.tokenizers.vqgan import VARIANTS, VQGAN, key_table

TINY = "vqgan-tiny"


def authors_state(name=TINY, seed=0):
    """A state dict in the authors' names, as their code would save it."""
    torch.manual_seed(seed)
    model = VQGAN(VARIANTS[name])
    return {key: t.contiguous().clone() for key, t in key_table(model.config).to_theirs(model.state_dict()).items()}


@pytest.fixture
def state():
    return authors_state()


def convert(path, folder, **options):
    return checkpoints.convert_file(path, "vqgan", folder, **options)


# -- what must work --------------------------------------------------------------------------------------------------


def test_round_trip_of_every_family(tmp_path):
    for name in ("vqgan-tiny", "vqgan-gumbel-tiny", "vqgan-maskgit-tiny", "vqgan-llamagen-tiny"):
        state = authors_state(name)
        torch.save({"state_dict": state}, tmp_path / "authors.ckpt")
        report = convert(tmp_path / "authors.ckpt", tmp_path / name)
        assert report["parameters"] == sum(t.numel() for key, t in state.items() if not key.endswith("codebook_used"))
        tok = vistok.load(tmp_path / name)
        assert (tok.config.family, tok.config.cnn) == (VARIANTS[name].family, VARIANTS[name].cnn)
        for suffix in ("safetensors", "pt"):
            checkpoints.export_file(tmp_path / name, tmp_path / f"back-{name}.{suffix}")
            back = checkpoints.read(tmp_path / f"back-{name}.{suffix}")
            assert back.keys() == state.keys()
            assert all(torch.equal(back[key], state[key]) for key in state)


def test_the_variant_is_recognised_from_shapes(tmp_path):
    config = replace(VARIANTS["vqgan-llamagen-f16"], cnn=replace(VARIANTS["vqgan-llamagen-f16"].cnn, width=32))
    model = VQGAN(config)
    save_file({k: t.contiguous() for k, t in key_table(config).to_theirs(model.state_dict()).items()}, tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "model")["variants"] == []  # of a size that was not published
    assert vistok.load(tmp_path / "model").config == config
    with torch.device("meta"):
        full = key_table(VARIANTS["vqgan-llamagen-f16"]).to_theirs(VQGAN(VARIANTS["vqgan-llamagen-f16"]).state_dict())
        done = checkpoints.convert(full, "vqgan", force=True)
    assert done.variants == ("vqgan-llamagen-f16", "vqgan-llamagen-f16-t2i")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: OrderedDict(s),
        lambda s: {"state_dict": s, "epoch": 3, "optimizer_states": [{"lr": 1.0}]},
        lambda s: {"model": s, "ema": s, "steps": 7},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
        lambda s: (
            {f"ema_model.{k}": v for k, v in s.items()}
            | {f"online_model.{k}": v * 0 for k, v in s.items()}
            | {"initted": torch.tensor(True), "step": torch.tensor(4)}
        ),
        lambda s: (
            {k: v * 0 for k, v in s.items()}
            | {f"model_ema.{k.replace('.', '')}": v for k, v in s.items()}
            | {"model_ema.decay": torch.tensor(0.99)}
        ),
    ],
    ids=["plain", "ordered", "lightning", "ema-entry", "ddp", "compiled-ddp", "attribute", "ema-pytorch", "ldm-ema"],
)
def test_wrappers_are_taken_off(state, tmp_path, wrap):
    torch.save(wrap(state), tmp_path / "file.pt")
    convert(tmp_path / "file.pt", tmp_path / "model")
    tok = vistok.load(tmp_path / "model")
    assert torch.equal(tok.quantizer.codebook, state["quantize.embedding.weight"])
    assert torch.equal(tok.encoder.cnn.conv_in.weight, state["encoder.conv_in.weight"])


def test_moving_averages_come_before_weights_and_key_chooses(state, tmp_path):
    zeros = {key: tensor * 0 for key, tensor in state.items()}
    torch.save({"model": zeros, "ema": state}, tmp_path / "file.pt")
    assert torch.equal(checkpoints.read(tmp_path / "file.pt")["quant_conv.bias"], state["quant_conv.bias"])
    assert not checkpoints.read(tmp_path / "file.pt", key="model")["quant_conv.bias"].any()
    with pytest.raises(FormatError, match="no entry 'weights'; it has model, ema"):
        checkpoints.read(tmp_path / "file.pt", key="weights")


def test_old_torch_files_and_framework_objects_beside_the_weights(state, tmp_path):
    import argparse

    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert checkpoints.read(tmp_path / "old.bin").keys() == state.keys()
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "args.pt")
    assert checkpoints.read(tmp_path / "args.pt").keys() == state.keys()


def test_lightning_files_load_without_lightning(state, tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    callback = type("ModelCheckpoint", (), {"__module__": name, "ran": []})
    callback.__setstate__ = lambda self, fields: callback.ran.append(fields)
    sys.modules[name].ModelCheckpoint = callback
    one = callback()
    one.best = 3
    torch.save({"state_dict": state, "callbacks": {callback: {"best": 1}}, "more": [one]}, tmp_path / "last.ckpt")
    assert checkpoints.read(tmp_path / "last.ckpt").keys() == state.keys()
    assert callback.ran == []  # its own class was never asked
    monkeypatch.undo()
    assert checkpoints.read(tmp_path / "last.ckpt").keys() == state.keys()


def test_judges_in_lightning_files_are_dropped(state, tmp_path):
    torch.save({"state_dict": state | {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)}}, tmp_path / "f.ckpt")
    convert(tmp_path / "f.ckpt", tmp_path / "model")


def test_authors_config_files(state, tmp_path):
    save_file(state, tmp_path / "file.safetensors")
    net = {"double_z": False, "z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
    net |= {"ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}
    plain = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"embed_dim": 8, "n_embed": 64}}}
    plain["model"]["params"]["ddconfig"] = net
    (tmp_path / "model.yaml").write_text(json.dumps(plain))
    convert(tmp_path / "file.safetensors", tmp_path / "model", config=tmp_path / "model.yaml")
    assert vistok.load(tmp_path / "model").spec.size == (32, 32)
    convert(tmp_path / "file.safetensors", tmp_path / "again", config=tmp_path / "model" / "config.json")
    net["ch_mult"] = [1, 2, 2]
    (tmp_path / "model.yaml").write_text(json.dumps(plain))
    with pytest.raises(MismatchError, match=r"of another shape .*it looks like vqgan"):
        convert(tmp_path / "file.safetensors", tmp_path / "wrong", config=tmp_path / "model.yaml")
    for text, error in (("a: [", FormatError), ("lr: 1", ConfigError), ("- 1", ConfigError)):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(error, match=r"bad\.yaml|no VQGAN config"):
            convert(tmp_path / "file.safetensors", tmp_path / "wrong", config=tmp_path / "bad.yaml")
    assert not (tmp_path / "wrong").exists()


# -- what must be refused --------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickles_are_refused_and_never_run(state, tmp_path, zipped):
    marker = tmp_path / "it-ran"
    torch.save({"model": state, "extra": Bomb(marker)}, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=r"is refused: .*mkdir"):
        convert(tmp_path / "f.pt", tmp_path / "model", force=True)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(FormatError, match=r"refused|damaged"):
        convert(tmp_path / "plain.pkl", tmp_path / "model", force=True)
    assert not marker.exists()
    assert not (tmp_path / "model").exists()


def test_the_advice_to_unpickle_anyway_is_not_passed_on(tmp_path):
    torch.save({"x": Bomb(tmp_path / "it-ran")}, tmp_path / "f.pt")
    with pytest.raises(FormatError) as caught:
        checkpoints.read(tmp_path / "f.pt")
    assert "weights_only=False" not in str(caught.value)
    assert "add_safe_globals" not in str(caught.value)


def test_truncated_and_flipped_files(state, tmp_path):
    save_file(state, tmp_path / "f.safetensors")
    torch.save(state, tmp_path / "f.pt")
    for name in ("f.safetensors", "f.pt"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FormatError, match=r"cut short|damaged"):
            convert(tmp_path / name, tmp_path / "model")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "f.pt").write_bytes(flipped)
    with pytest.raises(FormatError, match=r"damaged at .*checksum"):
        convert(tmp_path / "f.pt", tmp_path / "model")
    (tmp_path / "f.pt").write_bytes(b"")
    with pytest.raises(FormatError, match="damaged"):
        convert(tmp_path / "f.pt", tmp_path / "model")
    (tmp_path / "f.pt").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(FormatError, match="damaged or not a PyTorch checkpoint"):
        convert(tmp_path / "f.pt", tmp_path / "model")


def test_a_header_that_claims_more_than_the_file_holds(state, tmp_path):
    save_file(state, tmp_path / "f.safetensors")
    content = (tmp_path / "f.safetensors").read_bytes()
    (tmp_path / "f.safetensors").write_bytes((1 << 50).to_bytes(8, "little") + content[8:])
    with pytest.raises(FormatError, match="header would be"):
        convert(tmp_path / "f.safetensors", tmp_path / "model")


def test_another_size_and_another_system_are_named(state, tmp_path):
    wrong = dict(state)
    del wrong["decoder.conv_out.bias"]
    save_file(wrong, tmp_path / "f.safetensors")
    with pytest.raises(MismatchError, match=r"missing decoder\.cnn\.conv_out\.bias"):
        convert(tmp_path / "f.safetensors", tmp_path / "model")
    save_file(state | {"head.weight": torch.ones(1)}, tmp_path / "f.safetensors")
    with pytest.raises(MismatchError, match=r"do not belong here: head\.weight"):
        convert(tmp_path / "f.safetensors", tmp_path / "model")
    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(MismatchError, match=r"no vqgan checkpoint \(its first keys: conv1\.weight\)"):
        convert(tmp_path / "f.safetensors", tmp_path / "model")
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(MismatchError, match=r"no titok checkpoint.*it looks like vqgan"):
        checkpoints.convert_file(tmp_path / "f.safetensors", "titok", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_nan_and_infinite_weights_are_named_and_need_force(state, tmp_path):
    state["encoder.conv_in.bias"][3] = float("nan")
    state["quant_conv.weight"][0, 0] = float("-inf")
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(FormatError, match=r"encoder\.cnn\.conv_in\.bias, encoder\.project\.weight; --force"):
        convert(tmp_path / "f.safetensors", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    convert(tmp_path / "f.safetensors", tmp_path / "model", force=True)
    assert vistok.load(tmp_path / "model").encoder.cnn.conv_in.bias[3].isnan()


def test_existing_folders_are_kept_unless_overwritten(state, tmp_path):
    save_file(state, tmp_path / "f.safetensors")
    convert(tmp_path / "f.safetensors", tmp_path / "model")
    (tmp_path / "model" / "note").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        convert(tmp_path / "f.safetensors", tmp_path / "model")
    assert (tmp_path / "model" / "note").exists()
    convert(tmp_path / "f.safetensors", tmp_path / "model", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.safetensors", "model"]
    with pytest.raises(OutputError, match="cannot write"):
        convert(tmp_path / "f.safetensors", tmp_path / "f.safetensors" / "model")
    with pytest.raises(InputError, match="no authors' checkpoints"):
        checkpoints.convert_file(tmp_path / "f.safetensors", "toy", tmp_path / "toy")


def test_damage_of_a_model_folder_is_found_on_load(state, tmp_path):
    save_file(state, tmp_path / "f.safetensors")
    convert(tmp_path / "f.safetensors", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FormatError, match="damaged or exchanged"):
        vistok.load(tmp_path / "model")
    weights.write_bytes(content[:-100])
    with pytest.raises(FormatError, match="cut short"):
        vistok.load(tmp_path / "model")
    weights.unlink()
    with pytest.raises(FormatError, match="does not exist"):
        vistok.load(tmp_path / "model")


def test_folders_of_other_programs_without_a_checksum_are_hashed(state, tmp_path):
    save_file(state, tmp_path / "f.safetensors")
    convert(tmp_path / "f.safetensors", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    plain = json.loads(config.read_text())
    expected = vistok.load(tmp_path / "model").fingerprint
    del plain["checksum"]
    config.write_text(json.dumps(plain))
    assert vistok.load(tmp_path / "model").fingerprint == expected == plain["fingerprint"]
    plain["fingerprint"] = "0" * 32
    config.write_text(json.dumps(plain))
    with pytest.raises(FormatError, match="damaged or exchanged"):
        vistok.load(tmp_path / "model")


def test_the_remembered_fingerprint_is_the_hash_of_the_weights(state, tmp_path):
    from vistok.folder import hash_state

    save_file(state, tmp_path / "f.safetensors")
    convert(tmp_path / "f.safetensors", tmp_path / "model")
    tok = vistok.load(tmp_path / "model")
    assert tok.fingerprint == hash_state(tok.state_dict())
    tok.encode(torch.rand(1, 3, 32, 32))  # lays the weights out anew, changes none
    assert tok.fingerprint == hash_state(tok.state_dict())
    tok.save(tmp_path / "again")
    assert vistok.load(tmp_path / "again").fingerprint == tok.fingerprint


# -- published weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def published(state, tmp_path, monkeypatch):
    """A catalogue entry for the tiny model, its file, and a Hub that holds it and counts downloads."""
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "hub" / "weights.pt"
    file.parent.mkdir()
    torch.save({"model": state}, file)
    calls = []

    def download(repo, name, revision=None):
        calls.append((repo, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    content = file.read_bytes()
    source = WeightFile(
        repo="someone/model",
        file="sub/weights.pt",
        revision="abc",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        key="model",
    )
    return Variant(TINY, "vqgan", "tokenizer", weights=(source,)), file, calls


def test_published_weights_are_downloaded_and_converted_once(published, tmp_path):
    variant, file, calls = published
    tok = checkpoints.load_published(variant)
    assert tok.name == TINY
    assert calls == [("someone/model", "sub/weights.pt", "abc")]
    file.unlink()
    assert checkpoints.load_published(variant).fingerprint == tok.fingerprint
    assert len(calls) == 1
    assert (tmp_path / "cache" / "models" / TINY / "model.safetensors").exists()


def test_load_by_name_takes_that_road(published, monkeypatch):
    variant, _, _ = published
    entry = catalogue.entries()["vqgan"]
    monkeypatch.setattr(catalogue, "entries", lambda: {"vqgan": replace(entry, variants=(variant,))})
    assert vistok.load(TINY).encode(torch.rand(1, 3, 32, 32)).codes.shape == (1, 64)


def test_wrong_size_or_hash_of_a_download_is_refused(published, tmp_path):
    variant, _, _ = published
    source = variant.weights[0]
    with pytest.raises(FormatError, match="SHA-256"):
        checkpoints.load_published(replace(variant, weights=(replace(source, sha256="0" * 64),)))
    with pytest.raises(FormatError, match="bytes, published are 5"):
        checkpoints.load_published(replace(variant, weights=(replace(source, bytes=5),)))
    assert not (tmp_path / "cache" / "models").exists()


def test_without_a_hub_the_error_says_what_to_place_where(published, tmp_path, monkeypatch):
    variant, file, _ = published

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    place = tmp_path / "cache" / "files" / TINY / "weights.pt"
    with pytest.raises(VistokError, match=r"cannot get sub/weights\.pt of someone/model") as caught:
        checkpoints.load_published(variant)
    assert f"place the file at {place}" in str(caught.value)
    place.parent.mkdir(parents=True)
    file.rename(place)
    assert checkpoints.load_published(variant).name == TINY


def test_files_that_are_not_on_the_hub_name_their_page(tmp_path, monkeypatch):
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(VistokError, match=r"not on the Hugging Face Hub: get it from https://heibox.*place"):
        vistok.load("vqgan-imagenet-f16-1024")


def test_conversion_takes_little_more_memory_than_the_file(tmp_path):
    """Peak of resident memory in a process of its own, in shares of a 60 MB file."""
    import subprocess
    import sys

    config = replace(VARIANTS["vqgan-llamagen-f8"], codebook_size=1_600_000)
    config = replace(config, cnn=replace(config.cnn, width=32))
    program = f"""
import resource, torch
from pathlib import Path
from vistok import checkpoints
from vistok.tokenizers.vqgan import *
from vistok.nn.cnn import CNNConfig
config = {config!r}
file, folder = Path({str(tmp_path / "f.pt")!r}), Path({str(tmp_path / "model")!r})
if not file.exists():
    torch.save({{"model": key_table(config).to_theirs(VQGAN(config).state_dict())}}, file)
else:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoints.convert_file(file, "vqgan", folder)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / file.stat().st_size)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert float(ran.stdout) < 1.5  # the file itself is mapped and counts once


def test_another_system_of_a_size_that_shapes_do_not_tell_is_named_too():
    tok = vistok.create("titok-tiny-vq")
    authors = checkpoints.key_table(find_system("titok"), tok.config).to_theirs(tok.state_dict())
    with pytest.raises(MismatchError, match=r"looks like one-d-piece or titok, of a size that is not"):
        checkpoints.convert(authors, "vqgan")
