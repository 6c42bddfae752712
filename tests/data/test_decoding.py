import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.pictures import folder, parquet
from vistok.data import readahead
from vistok.data.decoding import CutOut, DecodingProcesses
from vistok.data.items import Item, Source
from vistok.data.readahead import decode_ahead
from vistok.data.sources import open_source

WHOLE = CutOut()


def ready(source, prepare=WHOLE, count=1):
    processes = DecodingProcesses(source, prepare, count)
    for _ in range(3000):
        if processes.ready:
            return processes
        time.sleep(0.01)
    raise AssertionError("no process has begun")


@pytest.fixture
def source(tmp_path):
    folder(tmp_path / "p", 12, size=(16, 12), classes=2)
    (tmp_path / "p" / "c0" / "0004.png").write_bytes(b"\x89PNG ruin")
    folder(tmp_path / "p" / "c1", 1, size=(200, 300), start=90)
    return open_source(tmp_path / "p")


def test_a_process_decodes_what_the_caller_would(source):
    processes = ready(source, CutOut(8, channels=1))
    try:
        done = processes.decode(range(len(source)))
        for index, one in enumerate(done):
            item = source[index]
            if item.id == "c1/0090.png":
                assert one is None  # not small: left to the caller
                continue
            assert (one.index, one.item.id, one.item.label) == (index, item.id, item.label)
            if item.id == "c0/0004.png":
                assert one.pixels is None
                assert "c0/0004.png is not an image" in one.error
            else:
                assert np.array_equal(one.pixels, CutOut(8, channels=1)(item))
    finally:
        processes.close()


def test_a_killed_process_gives_its_items_back_and_is_replaced(source):
    processes = ready(source)
    try:
        first = processes._all[0]
        first._popen.kill()
        assert processes.decode([0, 1]) == [None, None]
        assert first._popen.returncode is not None  # no zombie
        assert processes.decode([1])[0].item.id == source[1].id
        assert len(processes._all) == 2
    finally:
        processes.close()
    assert all(process._popen.returncode is not None for process in processes._all)
    assert processes.decode([0]) == [None]


def test_long_jobs_use_processes_and_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(readahead, "PROCESSES_FROM", 300)
    monkeypatch.setattr(readahead, "AHEAD_ITEMS", 32)
    source = open_source(parquet(tmp_path / "a.parquet", 300, rows_per_group=50))
    expected = [np.asarray(item.image) for item in source]
    used = []
    whole = DecodingProcesses.decode
    monkeypatch.setattr(DecodingProcesses, "decode", lambda self, run: used.append(len(run)) or whole(self, run))
    stream = decode_ahead(source, range(300), CutOut(), workers=2, expected=300)
    for index, decoded in enumerate(stream):
        assert decoded.index == index
        assert np.array_equal(decoded.pixels, expected[index])
        if index == 100:  # let them begin
            processes = stream.gi_frame.f_locals["helpers"]
            while not processes.ready:
                time.sleep(0.01)
            processes._all[0]._popen.kill()
    assert used


class Own(Source):
    """A source that does not pickle, as a user's own may."""

    def __init__(self, pictures):
        self._pictures, self.own_lock = pictures, threading.Lock()

    def __len__(self):
        return len(self._pictures)

    def item(self, index):
        return Item(str(index), lambda: self._pictures[index])

    def _contents(self):
        yield "own"


def test_what_does_not_travel_is_decoded_here(tmp_path, monkeypatch):
    monkeypatch.setattr(readahead, "PROCESSES_FROM", 40)
    folder(tmp_path / "p", 40)
    own = Own([path.read_bytes() for path in sorted((tmp_path / "p").iterdir())])
    assert [decoded.item.id for decoded in decode_ahead(own, range(40), CutOut(), workers=1, expected=40)] == [
        str(index) for index in range(40)
    ]


def test_processes_need_no_torch(tmp_path, source):
    errand = pickle.dumps((source, CutOut(8)))
    (tmp_path / "errand").write_bytes(errand)
    code = (
        "import pickle, sys; from vistok.data.decoding import _decode; "
        f"source, prepare = pickle.load(open({str(tmp_path / 'errand')!r}, 'rb')); "
        "assert _decode(source, prepare, 0)[1].shape == (8, 8, 3); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_processes_end_with_their_parent(source):
    code = (
        "import os; from tests.data.test_decoding import ready; from vistok.data.sources import open_source; "
        f"processes = ready(open_source({str(source._root)!r})); print(processes._all[0]._popen.pid, flush=True); "
        "os._exit(9)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(ran.stdout)
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except OSError:
            return
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().split(")")[1].split()[0] == "Z":
            return  # dead, and nobody in this container reaps orphans
        time.sleep(0.01)
    raise AssertionError("the process lives on")
