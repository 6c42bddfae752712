import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.data.pictures import folder, parquet, shard
from vistok.data import remote
from vistok.data.remote import RemotePath
from vistok.data.sources import open_source
from vistok.errors import InputError, MissingExtraError


def uploaded(local: Path, url: str) -> str:
    """The files below `local`, behind `url`."""
    system, root = fsspec.url_to_fs(url)
    if system.exists(root):
        system.rm(root, recursive=True)
    for path in sorted(local.rglob("*")):
        if path.is_file():
            system.pipe_file(f"{root}/{path.relative_to(local).as_posix()}", path.read_bytes())
    return url


def same(one, two) -> None:
    assert (one.kind, len(one), one.fingerprint) == (two.kind, len(two), two.fingerprint)
    assert (one.labelled, one.captioned, one.classes) == (two.labelled, two.captioned, two.classes)
    for here, there in zip(one, two, strict=True):
        assert (here.id, here.label, here.caption) == (there.id, there.label, there.caption)
        assert np.array_equal(np.asarray(here.image), np.asarray(there.image))


@pytest.fixture
def data(tmp_path):
    folder(tmp_path / "p", 6, classes=2)
    (tmp_path / "p" / ".hidden").mkdir()
    (tmp_path / "p" / ".hidden" / "x.png").write_bytes(b"x")
    parquet(tmp_path / "tables" / "a.parquet", 7)
    parquet(tmp_path / "tables" / "b.parquet", 3, start=7)
    shard(tmp_path / "shards" / "00.tar", 4)
    shard(tmp_path / "shards" / "01.tar", 3, start=4)
    return tmp_path


@pytest.mark.parametrize("kind", ["p", "tables", "shards"])
@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_url_is_read_as_the_folder_is(data, kind, protocol):
    url = uploaded(data / kind, f"memory://bucket/{kind}") if protocol == "memory" else f"file://{data / kind}"
    same(open_source(data / kind), open_source(url))


def test_files_and_patterns(data):
    url = uploaded(data / "shards", "memory://bucket/shards")
    same(open_source(str(data / "shards" / "*.tar")), open_source(url + "/*.tar"))
    same(open_source(data / "shards" / "01.tar"), open_source(url + "/01.tar"))
    same(open_source(str(data / "shards" / "{00..01}.tar")), open_source(url + "/{00..01}.tar"))
    same(open_source(data / "shards"), open_source([url + "/00.tar", url + "/01.tar"]))


def test_memory_travels_to_another_process(data):
    source = open_source(uploaded(data / "p", "memory://bucket/p"))
    (data / "pickle").write_bytes(pickle.dumps(source))
    code = f"import pickle; print([i.image.size for i in pickle.load(open({str(data / 'pickle')!r}, 'rb'))])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{[(16, 16)] * 6}\n"


def test_reading_tries_again_and_then_tells(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    path = RemotePath.of("memory://bucket/flaky.bin")
    path.system.pipe_file(path.path, b"content")
    calls = []

    def flaky(name, **span):
        calls.append(name)
        if len(calls) < 3:
            raise ConnectionError("reset by peer")
        return b"content"

    monkeypatch.setattr(path.system, "cat_file", flaky)
    assert path.read_bytes() == b"content"
    assert len(calls) == 3

    def broken(name, **span):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(path.system, "cat_file", broken)
    with pytest.raises(InputError, match=r"memory://bucket/flaky.bin cannot be read: reset by peer"):
        path.read_span(0, 3)


def test_what_cannot_be_opened(monkeypatch):
    with pytest.raises(InputError, match="nosuch:// is no protocol"):
        open_source("nosuch://bucket/x")
    with pytest.raises(InputError, match="does not exist or holds no files"):
        open_source("memory://empty-bucket")
    with pytest.raises(InputError, match="no file matches"):
        open_source("memory://empty-bucket/*.tar")

    def no_driver(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", no_driver)
    with pytest.raises(MissingExtraError, match="Install s3fs"):
        open_source("s3://bucket/x")
