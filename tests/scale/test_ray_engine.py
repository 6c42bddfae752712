"""The store that Ray's workers make is the local engine's, byte for byte, whoever dies on the way."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import tests.toy  # noqa: F401
import vistok
from tests.data.pictures import folder, parquet, shard
from tests.data.test_remote import uploaded
from tests.data.test_store import contents
from tests.scale.test_encode import SMALL, mixed
from vistok import extras
from vistok.data.items import Item, Source
from vistok.data.sources import open_source
from vistok.errors import InputError, MissingExtraError
from vistok.scale.encode import EncodeOptions, encode_source
from vistok.scale.ray_engine import RayEngine

try:
    import ray
except ImportError:
    ray = None
needs_ray = pytest.mark.skipif(ray is None, reason="needs Ray: pip install 'vistok[scale]'")


@pytest.fixture(scope="module")
def cluster():
    """One small Ray for all tests of this file."""
    ray.init(
        num_cpus=2,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def toy():
    return vistok.create("toy")


class Watched(Source):
    """Another source, slowly; each read leaves the reader's process id in a folder."""

    kind = "folder"

    def __init__(self, source: Source, notes: Path, pause: float) -> None:
        self.name = source.name
        self._source, self._notes, self._pause = source, notes, pause

    def __len__(self):
        return len(self._source)

    def item(self, index: int) -> Item:
        (self._notes / f"{index:04d}-{os.getpid()}").touch()
        time.sleep(self._pause)
        return self._source.item(index)

    def _contents(self):
        yield "watched"


@needs_ray
@pytest.mark.parametrize(
    "kind",
    ["memory", "shards", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("folder", "file", "parquet"))],
)
def test_the_store_is_the_local_one(tmp_path, toy, cluster, kind):
    if kind in ("folder", "file", "memory"):
        where = str(mixed(tmp_path / "p"))
        if kind == "memory":
            where = uploaded(Path(where), "memory://ray/p")
        elif kind == "file":
            where = f"file://{where}"
    elif kind == "parquet":
        where = parquet(tmp_path / "a.parquet", 30)
    else:
        where = shard(tmp_path / "a.tar", 30)
    source = open_source(where)
    seen = []
    report = encode_source(
        source, toy, tmp_path / "ray", SMALL, lambda done, bad: seen.append(done), engine=RayEngine(workers=1)
    )
    encode_source(source, toy, tmp_path / "local", SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert (report.items, report.encoded_now) == (30, 30)
    assert seen[0] == 0
    assert seen[-1] == 30
    assert report.quarantined == (4 if kind in ("folder", "file", "memory") else 0)


@needs_ray
def test_a_killed_worker_loses_and_doubles_nothing(tmp_path, toy, cluster):
    (tmp_path / "notes").mkdir()
    source = Watched(open_source(mixed(tmp_path / "p")), tmp_path / "notes", 0.02)
    killed = []

    def kill():
        while not killed:
            for note in sorted((tmp_path / "notes").glob("00[1-9]*")):  # it has finished batches by now
                killed.append(int(note.name.split("-")[1]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.005)

    threading.Thread(target=kill, daemon=True).start()
    report = encode_source(source, toy, tmp_path / "ray", SMALL, engine=RayEngine(workers=1))
    assert killed
    readers = {int(note.name.split("-")[1]) for note in (tmp_path / "notes").iterdir()}
    assert len(readers - {os.getpid()}) >= 2  # another one took over
    assert (report.rows, report.quarantined) == (26, 4)
    encode_source(source, toy, tmp_path / "local", SMALL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@needs_ray
def test_what_one_engine_begins_another_finishes(tmp_path, toy, cluster, monkeypatch):
    source = open_source(mixed(tmp_path / "p"))
    encode_source(source, toy, tmp_path / "whole", SMALL)
    whole, calls = toy.tokenize, []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("out of memory")
        return whole(*arguments, **options)

    monkeypatch.setattr(toy, "tokenize", fails)
    with pytest.raises(RuntimeError):
        encode_source(source, toy, tmp_path / "s", SMALL)
    monkeypatch.undo()
    report = encode_source(source, toy, tmp_path / "s", SMALL, engine=RayEngine(workers=1))
    assert 0 < report.encoded_now < 30
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@needs_ray
@pytest.mark.slow
def test_too_many_bad_pictures_stop_it(tmp_path, toy, cluster):
    source = open_source(mixed(tmp_path / "p"))
    few = EncodeOptions(4, workers=2, shard_items=12, max_bad=2)
    with pytest.raises(InputError, match="more than the 2 allowed"):
        encode_source(source, toy, tmp_path / "s", few, engine=RayEngine(workers=1))
    assert encode_source(source, toy, tmp_path / "s", SMALL, engine=RayEngine(workers=1)).quarantined == 4


@needs_ray
def test_the_command(tmp_path, cluster):
    from typer.testing import CliRunner

    from vistok.cli.main import app

    vistok.create("strata-tiny").save(tmp_path / "model")
    folder(tmp_path / "p", 10, size=(32, 48))
    words = ["encode", str(tmp_path / "p"), "-m", str(tmp_path / "model"), "--batch-size", "4", "--device", "cpu"]
    for engine in ("local", "ray"):
        ran = CliRunner().invoke(app, [*words, "-o", str(tmp_path / engine), "--engine", engine, "--json"])
        assert ran.exit_code == 0, ran.output
        assert json.loads(ran.stdout)["rows"] == 10
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


@needs_ray
def test_a_cluster_that_is_not_there(tmp_path, toy, monkeypatch):
    def unreachable(**_):
        raise ConnectionError("no cluster at 127.0.0.1:1")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    source = open_source(folder(tmp_path / "p", 4))
    with pytest.raises(InputError, match=r"Ray cannot be reached at ray://127.0.0.1:1"):
        encode_source(source, toy, tmp_path / "s", SMALL, engine=RayEngine("ray://127.0.0.1:1"))


def test_without_ray(tmp_path, toy, monkeypatch):
    def missing(module):
        raise ImportError(module)

    source = open_source(folder(tmp_path / "p", 4))
    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"this needs ray: pip install 'vistok\[scale\]'"):
        encode_source(source, toy, tmp_path / "s", SMALL, engine=RayEngine())
