"""What commands share: JSON that is JSON, and outputs that are not lost."""

import json
import math
from pathlib import Path

import pytest

from vistok.cli.terminal import emit_json, refuse_existing
from vistok.errors import OutputError


def test_numbers_that_json_lacks_become_null(capsys):
    emit_json({"psnr": math.inf, "list": [math.nan, 1.5, (2, None)], "path": Path("a")})
    assert json.loads(capsys.readouterr().out) == {"psnr": None, "list": [None, 1.5, [2, None]], "path": "a"}


def test_only_what_exists_and_holds_something_is_refused(tmp_path):
    file, empty, full = tmp_path / "file", tmp_path / "empty", tmp_path / "full"
    file.touch()
    empty.mkdir()
    (full / "inner").mkdir(parents=True)
    for free in (tmp_path / "new", empty):
        assert refuse_existing(free, overwrite=False) == free
    for taken in (file, full):
        with pytest.raises(OutputError, match="--overwrite"):
            refuse_existing(taken, overwrite=False)
        assert refuse_existing(str(taken), overwrite=True) == taken
