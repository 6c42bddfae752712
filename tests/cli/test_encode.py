import json

import pytest

import tests.toy  # noqa: F401
import vistok
from tests.data.pictures import folder
from tests.data.test_store import contents
from vistok.cli.main import main
from vistok.data.store import TokenStore


@pytest.fixture
def model(tmp_path):
    vistok.create("toy").save(tmp_path / "model")
    return str(tmp_path / "model")


def run(capsys, *words, code=0):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert left.value.code == code, printed.err
    return printed


def test_encode_and_decode(tmp_path, capsys, model):
    folder(tmp_path / "p", 5)
    (tmp_path / "p" / "0003.png").write_bytes(b"")
    told = run(
        capsys, "encode", tmp_path / "p", "-o", tmp_path / "s", "-m", model, "--json", "--verify", "--batch-size", 2
    )
    facts = json.loads(told.out)
    assert (facts["rows"], facts["quarantined"], facts["encoded_now"], facts["verified"]["wrong"]) == (4, 1, 5, [])
    before = contents(tmp_path / "s")
    again = run(capsys, "encode", tmp_path / "p", "-o", tmp_path / "s", "-m", model, "--batch-size", 2)
    assert again.out == ""
    assert "4 items in 1 shard" in again.err
    assert "1 unreadable, listed in" in again.err
    assert contents(tmp_path / "s") == before
    told = run(capsys, "decode", tmp_path / "s", "-o", tmp_path / "out", "-m", model, "--json")
    assert json.loads(told.out)["written"] == 4
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [f"000{n}.png" for n in (0, 1, 2, 4)]


def test_mistakes_are_one_line(tmp_path, capsys, model):
    folder(tmp_path / "p", 5)
    (tmp_path / "empty").mkdir()
    store = tmp_path / "s"
    run(capsys, "encode", tmp_path / "p", "-o", store, "-m", model)
    for words, told in [
        (("encode", tmp_path / "empty", "-o", tmp_path / "t", "-m", model), "holds no images"),
        (("encode", tmp_path / "p", "-o", tmp_path / "p", "-m", model), "holds other files"),
        (("encode", tmp_path / "p", "-o", store, "-m", model, "--crop", 8), "another option crop"),
        (("encode", tmp_path / "p", "-o", store, "-m", model, "--limit", 2), "another source"),
        (("encode", tmp_path / "p", "-o", tmp_path / "t", "-m", model, "--on-size", "stretch"), "expected pad or"),
        (("decode", tmp_path / "p", "-o", tmp_path / "out", "-m", model), "is not a token store"),
        (("decode", store, "-o", tmp_path / "out", "-m", model, "--length", 3), "do not decode on their own"),
    ]:
        printed = run(capsys, *words, code=1)
        assert told in printed.err
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_too_many_bad_items(tmp_path, capsys, model):
    folder(tmp_path / "p", 5)
    for number in (1, 2):
        (tmp_path / "p" / f"000{number}.png").write_bytes(b"x")
    words = ("encode", tmp_path / "p", "-o", tmp_path / "s", "-m", model, "--batch-size", 2)
    assert "2 items cannot be read, more than the 1 allowed" in run(capsys, *words, "--max-bad", 1, code=1).err
    run(capsys, *words)
    assert TokenStore(tmp_path / "s").ids == ["0000.png", "0003.png", "0004.png"]


def test_overwrite_begins_anew(tmp_path, capsys, model):
    folder(tmp_path / "p", 3)
    words = ("encode", tmp_path / "p", "-o", tmp_path / "s", "-m", model)
    run(capsys, *words)
    run(capsys, *words, "--limit", 2, "--overwrite")
    assert len(TokenStore(tmp_path / "s")) == 2
