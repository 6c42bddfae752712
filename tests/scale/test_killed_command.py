"""The command itself, with a real tokenizer, killed and run again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import vistok
from tests.data.pictures import folder
from tests.data.test_store import contents

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_encode_and_decode_killed_and_run_again(tmp_path):
    vistok.create("strata-tiny").save(tmp_path / "model")
    folder(tmp_path / "p", 240, size=(64, 96))
    (tmp_path / "p" / "0007.png").write_bytes(b"\x89PNG")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vistok"]
    model = ["-m", str(tmp_path / "model"), "--batch-size", "4"]
    rng = np.random.RandomState(0)

    def run(words, out, marker, kills):
        words = [*command, *words, "-o", str(out), *model]
        for _ in range(kills):
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
            while process.poll() is None and not (out / marker).exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.0))
            process.kill()
            process.wait()
        subprocess.run(words, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)

    run(["encode", str(tmp_path / "p")], tmp_path / "whole", "manifest.json", 0)
    run(["encode", str(tmp_path / "p")], tmp_path / "killed", "manifest.json", 3)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    run(["decode", str(tmp_path / "whole")], tmp_path / "out", ".vistok-decode.json", 0)
    run(["decode", str(tmp_path / "whole")], tmp_path / "again", ".vistok-decode.json", 3)
    written = contents(tmp_path / "again")
    assert written == contents(tmp_path / "out")
    assert len(written) == 240  # 239 pictures and the record
