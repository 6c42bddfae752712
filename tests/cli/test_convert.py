"""`vistok convert` from the outside."""

import json

import pytest
import torch
from safetensors.torch import save_file

import vistok
from vistok.checkpoints import read
from vistok.cli.main import main
from vistok.tokenizers.vqgan import key_table


@pytest.fixture
def authors(tmp_path):
    torch.manual_seed(0)
    tok = vistok.create("vqgan-llamagen-tiny")
    state = {name: tensor.contiguous() for name, tensor in key_table(tok.config).to_theirs(tok.state_dict()).items()}
    save_file(state, tmp_path / "authors.safetensors")
    return tmp_path / "authors.safetensors"


def run(*words):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


def test_there_and_back(authors, tmp_path, capsys):
    model, back = tmp_path / "model", tmp_path / "back.safetensors"
    assert run("convert", authors, "--system", "vqgan", "-o", model, "--json") == 0
    assert json.loads(capsys.readouterr().out)["system"] == "vqgan"
    assert vistok.load(model).encode(torch.rand(1, 3, 32, 32)).codes.shape == (1, 64)
    assert run("convert", model, "--to", "authors", "-o", back) == 0
    state = read(authors)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read(back).items())


def test_it_says_what_it_recognised(authors, tmp_path, capsys):
    assert run("convert", authors, "--system", "vqgan", "-o", tmp_path / "model") == 0
    captured = capsys.readouterr()
    assert "recognised" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which system is it"),
        (["--system", "vqgam"], "did you mean 'vqgan'"),
        (["--system", "vqgan", "--to", "them"], "expected 'vistok' or 'authors'"),
        (["--system", "vqgan", "--config", "nothing.yaml"], "nothing.yaml does not exist"),
        (["--system", "one-d-piece"], "it looks like vqgan"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(authors, tmp_path, capsys, words, told):
    assert run("convert", authors, "-o", tmp_path / "model", *words) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_what_exists_is_kept(authors, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("x")
    assert run("convert", authors, "--system", "vqgan", "-o", tmp_path / "model") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("convert", authors, "--system", "vqgan", "-o", tmp_path / "model", "--overwrite") == 0
    assert run("convert", tmp_path / "model", "--system", "titok", "--to", "authors", "-o", tmp_path / "back.pt") == 1
    assert "holds a model of vqgan" in capsys.readouterr().err
