"""The command line as a whole: fast help, one line per error, and nothing but JSON on stdout with --json."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vistok.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def call(*words: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, "-m", "vistok", *words]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)


def run(capsys, *words: str) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr."""
    from vistok.cli.terminal import console, output

    console.cache_clear()
    output.cache_clear()
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    captured = capsys.readouterr()
    console.cache_clear()
    output.cache_clear()
    return int(exit_.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("words", [("--help",), ("list", "--json"), ("systems",), ("train", "--help")])
def test_light_commands_import_no_torch(words):
    done = call(*words, python=("-X", "importtime"))
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "vistok.cli.main" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "numpy", "huggingface_hub", "accelerate")}


@pytest.mark.skipif(os.name == "nt", reason="children's CPU time is not counted there")
def test_help_takes_less_than_half_a_second():
    seconds = []
    for _ in range(3):  # CPU time, which a busy machine does not stretch as it does the clock's
        before = os.times()
        assert call("--help").returncode == 0
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(used)
    assert 0 < min(seconds) < 0.5


def test_help_names_every_command():
    told = call("--help").stdout
    assert [name for name in COMMANDS if f" {name} " not in told] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_file_and_help(name, capsys):
    code, out, err = run(capsys, name, "--help")
    assert code == 0
    assert f"vistok {name}" in out
    assert err == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lisst"], "no command 'lisst'; did you mean 'list'"),
        (["--nonsense"], "--nonsense"),
        (["list", "--nonsense"], "--nonsense"),
        (["info"], "(see `vistok info --help`)"),
        (["info", "stratta"], "did you mean 'strata"),
        (["reconstruct", "a.png", "--length", "0"], "--length"),
        (["train", "stratta/tiny", "--data", ".", "-o", "run"], "no recipe 'stratta/tiny'; did you mean 'strata/tiny'"),
        (["train", "strata/tiny", "train.step=1", "--data", ".", "-o", "run"], "did you mean 'steps'"),
        (["train", "strata/tiny", "--data", "no/such/folder", "-o", "run"], "no/such/folder does not exist"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(words, told, capsys):
    code, out, err = run(capsys, *words)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback():
    done = call("info", "stratta", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Traceback" not in call("info", "stratta").stderr


def test_errors_of_the_machine_are_one_line_too(capsys, monkeypatch):
    from vistok import catalogue

    for error, told in [
        (OSError(28, "No space left on device", "out.png"), "out.png: No space left on device"),
        (PermissionError(13, "Permission denied", "/etc/x"), "/etc/x: Permission denied"),
        (MemoryError(), "out of memory"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("division by zero"), "should not have happened: ZeroDivisionError: division by zero"),
    ]:

        def fail(*_: object, error=error) -> None:
            raise error

        monkeypatch.setattr(catalogue, "select", fail)
        code, out, err = run(capsys, "list")
        assert (code, out) == (1, "")
        assert told in err
        assert err.count("\n") == 1


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-c", "from vistok.cli.main import main; main(['list', '--json'])"],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(30)


# -- list, info, systems ---------------------------------------------------------------------------------------------


def test_list_is_a_list_of_objects(capsys):
    code, out, _ = run(capsys, "list", "--json")
    found = json.loads(out)
    assert code == 0
    assert {"name", "system", "role", "licences", "weights", "tokens"} <= found[0].keys()
    assert {"code", "weights", "data"} == found[0]["licences"].keys()
    assert len({entry["name"] for entry in found}) == len(found) > 5


def test_list_takes_patterns_and_prefixes_and_licences(capsys):
    every = json.loads(run(capsys, "list", "--json")[1])
    some = json.loads(run(capsys, "list", "titok-*", "--json")[1])
    assert 0 < len(some) < len(every)
    assert all(entry["name"].startswith("titok-") for entry in some)
    free = json.loads(run(capsys, "list", "--commercial-ok", "--json")[1])
    assert [entry for entry in every if entry["commercial_ok"]] == free
    assert json.loads(run(capsys, "list", "tito", "--json")[1])[0]["system"] == "titok"
    code, out, err = run(capsys, "list", "titokk-*")
    assert (code, out) == (0, "")
    assert "no model matches" in err


def test_list_as_a_table_has_every_name(capsys):
    out = run(capsys, "list")[1]
    names = [entry["name"] for entry in json.loads(run(capsys, "list", "--json")[1])]
    assert [name for name in names if name not in out] == []


def test_systems_are_computed_from_the_tree(capsys, tmp_path):
    from vistok.inventory import holdings

    found = {row["system"]: row for row in json.loads(run(capsys, "systems", "--json")[1])}
    assert found["titok"]["code"]
    assert found["titok"]["parity"] is True
    assert "tiny" in found["strata"]["recipes"]
    elsewhere = {row.system: row for row in holdings(tmp_path)}  # as from a wheel without anything in it
    assert elsewhere["titok"].parity is None
    assert elsewhere["titok"].code == ()
    (tmp_path / "reproductions").mkdir()
    (tmp_path / "reproductions" / "titok.py").touch()
    (tmp_path / "reproductions" / "titok.json").write_text('{"verdict": "held"}')
    assert {row.system: row for row in holdings(tmp_path)}["titok"].reproduction == "held"
    assert "titok" in run(capsys, "systems")[1]


def test_info_tells_the_layout_of_a_name_and_of_a_folder(capsys, tmp_path):
    import vistok

    facts = json.loads(run(capsys, "info", "strata-tiny", "--json")[1])
    assert facts["length"] == sum(math.prod(segment["shape"]) for segment in facts["segments"])
    assert facts["bits"] == vistok.create("strata-tiny").spec.bits
    assert facts["fingerprint"] is None
    model = vistok.create("strata-tiny")
    model.save(tmp_path / "model")
    facts = json.loads(run(capsys, "info", str(tmp_path / "model"), "--json")[1])
    assert facts["fingerprint"] == model.fingerprint
    assert facts["parameter_count"] == sum(parameter.numel() for parameter in model.parameters())
    assert model.fingerprint in run(capsys, "info", str(tmp_path / "model"))[1]
