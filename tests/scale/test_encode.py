import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tests.toy  # noqa: F401
import vistok
from tests.data.pictures import encoded, folder, parquet, picture, shard
from tests.data.test_store import contents
from vistok.data import readahead
from vistok.data.readahead import decode_ahead
from vistok.data.sources import open_source
from vistok.data.store import TokenStore
from vistok.errors import FormatError, InputError, MismatchError, OutputError
from vistok.scale.encode import EncodeOptions, encode_source
from vistok.scale.verify import verify_store

ROOT = Path(__file__).parents[2]
SMALL = EncodeOptions(batch_size=4, workers=2, shard_items=12)


@pytest.fixture
def toy():
    return vistok.create("toy")


def mixed(root: Path) -> Path:
    """30 pictures of three sizes, four of them damaged."""
    for number in range(30):
        folder(root, 1, size=[(16, 16), (16, 24), (9, 7)][number % 7 % 3], start=number)
    for number in (0, 5, 6, 29):
        (root / f"{number:04d}.png").write_bytes(b"\x89PNG damaged")
    return root


def test_what_is_stored_is_what_the_tokenizer_gives(tmp_path, toy):
    source = open_source(mixed(tmp_path / "p"))
    report = encode_source(source, toy, tmp_path / "s", SMALL)
    assert (report.items, report.rows, report.quarantined, report.encoded_now) == (30, 26, 4, 30)
    store = TokenStore(tmp_path / "s")
    assert [entry["id"] for entry in store.quarantine] == ["0000.png", "0005.png", "0006.png", "0029.png"]
    assert "0005.png is not an image" in store.quarantine[1]["error"]
    for rows in store.batches(1):
        image = source[int(rows.index[0])].image
        assert next(iter(rows.tokens)).equal(toy.encode(image))
    images = toy.decode(store[0:5].tokens)
    assert [tuple(image.shape[-2:]) for image in images] == [source[int(i)].size for i in store.index[:5]]


@pytest.mark.parametrize("kind", ["parquet", "shards"])
def test_labels_and_captions_travel_along(tmp_path, toy, kind):
    made = parquet(tmp_path / "a.parquet", 10) if kind == "parquet" else shard(tmp_path / "a.tar", 10)
    encode_source(open_source(made), toy, tmp_path / "s", SMALL)
    rows = TokenStore(tmp_path / "s")[:]
    assert rows.labels.tolist() == [n % (3 if kind == "parquet" else 2) for n in range(10)]
    assert rows.captions == (None if kind == "parquet" else [f"picture {n}" for n in range(10)])
    assert rows.tokens.equal(toy.encode([picture(n) for n in range(10)]))


def test_a_bad_neighbour_changes_neither_batch_nor_shape(tmp_path, toy, monkeypatch):
    folder(tmp_path / "p", 12)
    shapes = []
    whole = toy.tokenize
    monkeypatch.setattr(toy, "tokenize", lambda pixels, *a, **k: shapes.append(pixels.shape) or whole(pixels, *a, **k))
    encode_source(open_source(tmp_path / "p"), toy, tmp_path / "good", SMALL)
    assert shapes == [(4, 3, 16, 16)] * 3
    good = TokenStore(tmp_path / "good")[:].tokens
    for number in (0, 1, 6, 11):
        (tmp_path / "p" / f"{number:04d}.png").write_bytes(b"ruin")
    shapes.clear()
    encode_source(open_source(tmp_path / "p"), toy, tmp_path / "bad", SMALL)
    assert shapes == [(4, 3, 16, 16)] * 3
    rows = TokenStore(tmp_path / "bad")[:]
    assert rows.tokens.equal(good[rows.index])


def test_large_pictures_come_in_small_groups(tmp_path, toy, monkeypatch):
    folder(tmp_path / "p", 6, size=(256, 512))
    folder(tmp_path / "p", 2, size=(600, 600), start=6)
    seen = []
    whole = toy.tokenize
    monkeypatch.setattr(toy, "tokenize", lambda pixels, *a, **k: seen.append(pixels.shape) or whole(pixels, *a, **k))
    encode_source(open_source(tmp_path / "p"), toy, tmp_path / "s", EncodeOptions(batch_size=4))
    assert sorted((shape[0], shape[-1]) for shape in seen) == [(1, 600), (1, 600), (2, 512), (2, 512), (2, 512)]


def test_too_many_bad_pictures_stop_it_and_it_goes_on(tmp_path, toy):
    folder(tmp_path / "p", 40)
    for number in range(10, 22):
        (tmp_path / "p" / f"{number:04d}.png").write_bytes(b"ruin")
    source = open_source(tmp_path / "p")
    with pytest.raises(InputError, match="items cannot be read, more than the 10 allowed"):
        encode_source(source, toy, tmp_path / "s", SMALL)
    with pytest.raises(InputError, match="more than the 10 allowed"):
        encode_source(source, toy, tmp_path / "s", SMALL)
    report = encode_source(source, toy, tmp_path / "s", EncodeOptions(4, workers=2, shard_items=12, max_bad=12))
    assert report.encoded_now < 40
    assert (report.rows, report.quarantined) == (28, 12)
    encode_source(source, toy, tmp_path / "t", EncodeOptions(4, workers=1, shard_items=12, max_bad=99))
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


def test_sizes_that_are_refused_go_to_quarantine(tmp_path):
    folder(tmp_path / "p", 4)
    folder(tmp_path / "p", 1, size=(12, 16), start=4)
    source = open_source(tmp_path / "p")
    fixed = vistok.create("toy-16")
    encode_source(source, fixed, tmp_path / "s", EncodeOptions(on_size="refuse"))
    store = TokenStore(tmp_path / "s")
    assert [entry["id"] for entry in store.quarantine] == ["0004.png"]
    assert "0004.png: a picture of 12x16" in store.quarantine[0]["error"]
    encode_source(source, fixed, tmp_path / "t", EncodeOptions(on_size="pad"))
    assert TokenStore(tmp_path / "t")[4].tokens.canvas[0].padding == (0, 0, 0, 4)


def test_crops_and_limits(tmp_path, toy):
    source = open_source(folder(tmp_path / "p", 6, size=(20, 30)))
    encode_source(source.first(3), toy, tmp_path / "s", EncodeOptions(crop=16))
    rows = TokenStore(tmp_path / "s")[:]
    assert len(rows) == 3
    assert rows.tokens.canvas[0].size == (16, 16)
    with pytest.raises(MismatchError, match="another source"):
        encode_source(source, toy, tmp_path / "s", EncodeOptions(crop=16))
    with pytest.raises(MismatchError, match="another option crop"):
        encode_source(source.first(3), toy, tmp_path / "s", EncodeOptions())
    with torch.no_grad():
        toy.encoder.gain.mul_(0.5)
    with pytest.raises(MismatchError, match="another tokenizer"):
        encode_source(source.first(3), toy, tmp_path / "s", EncodeOptions(crop=16))


def test_a_finished_store_is_left_alone(tmp_path, toy, monkeypatch):
    source = open_source(folder(tmp_path / "p", 6))
    encode_source(source, toy, tmp_path / "s", SMALL)
    before = contents(tmp_path / "s")
    monkeypatch.setattr(toy, "tokenize", None)
    report = encode_source(source, toy, tmp_path / "s", SMALL)
    assert (report.encoded_now, report.rows) == (0, 6)
    assert contents(tmp_path / "s") == before


def test_verification(tmp_path, toy):
    source = open_source(mixed(tmp_path / "p"))
    encode_source(source, toy, tmp_path / "s", SMALL)
    found = verify_store(tmp_path / "s", source, toy, SMALL, batches=99)
    assert (found.items, found.share_differing, found.wrong) == (26, 0.0, ())
    (tmp_path / "p" / "0003.png").write_bytes(encoded(picture(99, (16, 16))))
    found = verify_store(tmp_path / "s", source, toy, SMALL, batches=99)
    assert found.wrong == ("0003.png",)
    shard_path = tmp_path / "s" / "tokens-00000-of-00003.parquet"
    shard_path.write_bytes(shard_path.read_bytes().replace(b"0001.png", b"9001.png"))
    with pytest.raises(FormatError, match="tokens-00000"):
        verify_store(tmp_path / "s", source, toy, SMALL)


def test_an_error_of_the_model_keeps_what_is_done(tmp_path, toy, monkeypatch):
    source = open_source(folder(tmp_path / "p", 20))
    whole, calls = toy.tokenize, []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return whole(*arguments, **options)

    monkeypatch.setattr(toy, "tokenize", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_source(source, toy, tmp_path / "s", SMALL)
    assert encode_source(source, toy, tmp_path / "s", SMALL).encoded_now == 8


def test_a_folder_that_cannot_be_written(tmp_path, toy):
    (tmp_path / "file").touch()
    source = open_source(folder(tmp_path / "p", 4))
    with pytest.raises(OutputError, match="cannot write"):
        encode_source(source, toy, tmp_path / "file" / "s", SMALL)


def test_a_disk_that_fills_up(tmp_path, toy, monkeypatch):
    from vistok.data import store_writer

    source = open_source(mixed(tmp_path / "p"))
    encode_source(source, toy, tmp_path / "a", SMALL)
    monkeypatch.setattr(store_writer, "SPILL_SECONDS", 0)
    whole, writes = store_writer.write_atomically, []

    def full(path, content):
        writes.append(path)
        if len(writes) > 6:
            raise OutputError(f"cannot write {path}: No space left on device")
        whole(path, content)

    monkeypatch.setattr(store_writer, "write_atomically", full)
    with pytest.raises(OutputError, match="No space left"):
        encode_source(source, toy, tmp_path / "b", SMALL)
    monkeypatch.setattr(store_writer, "write_atomically", whole)
    assert encode_source(source, toy, tmp_path / "b", SMALL).encoded_now < 30
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_tokenizers_that_need_what_is_not_there(tmp_path, toy):
    from dataclasses import replace

    from vistok.layout import Needs

    source = open_source(folder(tmp_path / "p", 2))
    toy.spec = replace(toy.spec, needs=Needs(encode=("text",)))
    with pytest.raises(InputError, match="cannot encode without text, which p does not have"):
        encode_source(source, toy, tmp_path / "s")
    toy.spec = replace(toy.spec, needs=Needs(), modality="video")
    with pytest.raises(InputError, match="encodes videos"):
        encode_source(source, toy, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_decoding_waits_when_memory_is_full(tmp_path):
    source = open_source(folder(tmp_path / "p", 30, size=(32, 32)))
    most, now = [0], set()

    def prepare(item):
        now.add(item.id)
        most[0] = max(most[0], len(now))
        time.sleep(0.002)
        return np.asarray(item.image)

    order = []
    for decoded in decode_ahead(source, range(30), prepare, workers=6, budget=3 * 32 * 32 * 4):
        order.append(decoded.index)
        time.sleep(0.004)
        now.discard(decoded.item.id)
    assert order == list(range(30))
    assert most[0] <= 5  # three in the budget, the one whose turn it is, the one in use


def test_decoding_ahead_is_bounded_and_ends_when_left(tmp_path, monkeypatch):
    monkeypatch.setattr(readahead, "AHEAD_ITEMS", 5)
    source = open_source(folder(tmp_path / "p", 30))
    begun = []
    stream = decode_ahead(source, range(30), lambda item: begun.append(item.id) or np.asarray(item.image))
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(begun) <= 3 + 5


@pytest.mark.parametrize(
    ("kind", "kills"), [("folder", 2), pytest.param("parquet", 8, marks=pytest.mark.slow)], ids=["folder", "parquet"]
)
def test_killed_at_any_moment(tmp_path, kind, kills):
    """kill -9 at seeded random moments, run again each time: the store equals an uninterrupted one, byte for byte."""
    source = mixed(tmp_path / "p") if kind == "folder" else parquet(tmp_path / "a.parquet", 30)
    run = [sys.executable, "-m", "tests.scale.toy_encode", str(source), str(tmp_path / "killed")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    encode_source(open_source(source), vistok.create("toy"), tmp_path / "whole", SMALL)
    rng = np.random.RandomState(kills)
    for _ in range(kills):
        process = subprocess.Popen([*run, "0.2"], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        assert process.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.wait() != 0
        process.stdout.close()
    subprocess.run([*run, "0"], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_at_every_write(tmp_path, toy, monkeypatch):
    """As if the process died at each of its file operations in turn, its temporary file half written."""
    from vistok.data import store_writer

    class Death(BaseException):
        pass

    source = open_source(mixed(tmp_path / "p"))
    encode_source(source, toy, tmp_path / "whole", SMALL)
    monkeypatch.setattr(store_writer, "SPILL_SECONDS", 0)
    monkeypatch.setattr(store_writer.StoreWriter, "__exit__", lambda self, *_: self._unlock())  # no last words
    whole = store_writer.write_atomically
    for fatal in range(1, 40):
        count = [0]

        def dies(path, content, count=count, fatal=fatal):
            count[0] += 1
            if count[0] == fatal:
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / f".{path.name}.abc.tmp").write_bytes(b"half")
                raise Death
            if count[0] == fatal + 1:
                raise Death
            whole(path, content)

        monkeypatch.setattr(store_writer, "write_atomically", dies)
        try:
            encode_source(source, toy, tmp_path / f"s{fatal}", SMALL)
            break
        except Death:
            pass
        monkeypatch.setattr(store_writer, "write_atomically", whole)
        encode_source(source, toy, tmp_path / f"s{fatal}", SMALL)
        assert contents(tmp_path / f"s{fatal}") == contents(tmp_path / "whole"), fatal
    assert fatal > 8


@pytest.mark.slow
def test_the_store_of_a_hundred_megapixel_picture(tmp_path, toy):
    buffer = io.BytesIO()
    Image.new("L", (12_500, 8_000), 100).save(buffer, "PNG")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "big.png").write_bytes(buffer.getvalue())
    (tmp_path / "p" / "small.png").write_bytes(encoded(picture(0)))
    fixed = vistok.create("toy", only=((400, 500),))
    encode_source(open_source(tmp_path / "p"), fixed, tmp_path / "s", EncodeOptions(on_size="tile"))
    tokens = TokenStore(tmp_path / "s")[0].tokens
    assert tokens.canvas[0].tiles == (20, 25)
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["segments"] is None
