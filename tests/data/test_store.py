import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok.data.store import Manifest, TokenStore, code_type, rows_of, table_of
from vistok.data.store_writer import LOCK, PARTS, Done, StoreWriter, remove_store
from vistok.errors import FormatError, InputError, MismatchError, OutputError
from vistok.layout import Canvas, Segment
from vistok.tokens import Source, Tokens

MADE_BY = Source("toy", "0" * 32, "rgb, [0, 1]")
GRID = (Segment("grid", (2, 3), (8, 5)),)


def manifest(items=23, batch_size=4, batches_per_shard=2, **changes):
    source = {"kind": "folder", "name": "p", "items": items, "fingerprint": "f", "classes": ["a", "b"]}
    return replace(
        Manifest(
            MADE_BY, source | {"labelled": True, "captioned": True}, {"crop": None}, batch_size, batches_per_shard
        ),
        **changes,
    )


def some_codes(items, segments=GRID, seed=0):
    rng = np.random.RandomState(seed)
    count = sum(segment.count for segment in segments)
    codes = np.stack([rng.randint(0, size, (items, count)) for size in segments[0].codebooks], -1)
    return Tokens(segments, torch.from_numpy(codes), canvas=(Canvas((8, 12)),) * items, source=MADE_BY)


def done(plan, batch, bad=()):
    span = list(plan.items_of(batch))
    places = [place for place, index in enumerate(span) if index not in bad]
    tokens = some_codes(len(span), seed=batch)[places] if places else None
    table = table_of(
        [(places, tokens)] if places else [],
        span,
        [f"id/{index}" for index in span],
        [index % 2 for index in span],
        [None if index == 3 else f"picture {index}" for index in span],
    )
    return Done(batch, table, [{"index": i, "id": f"id/{i}", "error": f"no {i}"} for i in span if i in bad])


def write(path, plan, order=None, bad=()):
    with StoreWriter(path, plan) as writer:
        for batch in order if order is not None else writer.pending:
            writer.add(done(plan, batch, bad))
        return writer.finish()


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "s", manifest(), bad={5, 22})
    return TokenStore(tmp_path / "s")


def test_a_store_gives_back_what_went_in(store):
    assert len(store) == 21
    assert store.made_by == MADE_BY
    assert store.classes == ("a", "b")
    assert store.ids[4:6] == ["id/4", "id/6"]
    rows = store[4:9]
    assert rows.index.tolist() == [4, 6, 7, 8, 9]
    assert rows.labels.tolist() == [0, 0, 1, 0, 1]
    assert rows.captions[0] == "picture 4"
    assert store[3].captions == [""]
    expected = Tokens.cat([some_codes(4, seed=1)[[0, 2, 3]], some_codes(4, seed=2)[[0, 1]]])
    assert rows.tokens.equal(expected)
    assert rows.tokens.source == MADE_BY
    assert store[[20, 0, 7]].ids == ["id/21", "id/0", "id/8"]
    assert store[-1].ids == ["id/21"]
    assert [len(part) for part in store.batches(8)] == [8, 8, 5]
    assert store.quarantine == [{"index": i, "id": f"id/{i}", "error": f"no {i}"} for i in (5, 22)]
    store.check()
    for wrong in (21, -22, [21]):
        with pytest.raises(IndexError):
            store[wrong]
    with pytest.raises(InputError):
        store[3:3]


def test_the_datasets_library_reads_it(store, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = str(store.path / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 21
    row = loaded[4]
    assert row["id"] == "id/4"
    assert np.array_equal(np.reshape(row["codes"], (6, 2)), store[4].tokens.codes[0].numpy())
    assert row["length"] == 6
    assert Canvas.from_json(json.loads(row["canvas"])) == Canvas((8, 12))
    assert json.loads((store.path / "manifest.json").read_text())["segments"] == [["grid", [2, 3], [8, 5], None]]


@pytest.mark.parametrize(
    ("segments", "kind"),
    [
        ((Segment("g", (2, 2), (2**15,)),), np.int16),
        ((Segment("g", (2, 2), (2**15 + 1,)),), np.int32),
        ((Segment("g", (2, 2), (2**36,)),), np.int64),
        ((Segment("a", (2,), (4, 4)), Segment("b", (3,), (4,))), np.int16),
    ],
)
def test_codes_of_any_size(segments, kind):
    assert code_type(segments) is kind
    codes = torch.full((2, sum(s.count for s in segments)), segments[0].codebooks[0] - 1)
    if len(segments) > 1:
        codes = torch.stack([codes, codes], -1)
        codes[:, 2:, 1] = -1
    tokens = Tokens(segments, codes, canvas=(Canvas((4, 4)),) * 2)
    back = rows_of(table_of([([0, 1], tokens)], [0, 1], ["a", "b"], None, None))
    assert back.tokens.equal(tokens)
    assert back.labels is None
    assert back.captions is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_and_masks(dtype):
    segments = (Segment("v", (5,), dim=3),)
    keep = torch.tensor([[True, False, True, True, False], [True] * 5])
    vectors = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = Tokens(segments, vectors=vectors, keep=keep, canvas=(Canvas((4, 4), padding=(0, 0, 1, 1)),) * 2)
    table = table_of([([0, 1], tokens)], [0, 1], ["a", "b"], [None, 1], None)
    assert table.column("length").to_pylist() == [3, 5]
    back = rows_of(table)
    assert back.tokens.equal(tokens)
    assert back.tokens.vectors.dtype == dtype
    assert back.labels.tolist() == [-1, 1]
    assert rows_of(table.slice(1, 1)).tokens.equal(tokens[1])


def test_several_layouts_in_one_store():
    one, two = some_codes(2), some_codes(1, (Segment("grid", (4, 4), (8, 5)),), seed=5)
    short = some_codes(1, seed=9).prefix(4)
    table = table_of([([0, 2], one), ([1], two), ([3], short)], [0, 1, 2, 3], list("abcd"), None, None)
    back = rows_of(table.sort_by("index"))
    assert [a.equal(b) for a, b in zip(back.tokens, [one[0], two, one[1], short], strict=True)] == [True] * 4


def test_any_order_gives_the_same_bytes(tmp_path, monkeypatch):
    plan = manifest()
    write(tmp_path / "a", plan, bad={1, 9})
    monkeypatch.setattr("vistok.data.store_writer.SPILL_SECONDS", 0)
    write(tmp_path / "b", plan, order=[5, 0, 3, 2, 4, 1, 1], bad={9, 1})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == [
        "manifest.json",
        "quarantine.jsonl",
        *[f"tokens-0000{n}-of-00003.parquet" for n in range(3)],
    ]


@pytest.mark.parametrize("stop", range(1, 6))
def test_resumed_after_any_batch(tmp_path, monkeypatch, stop):
    plan = manifest()
    write(tmp_path / "a", plan, bad={1, 9})
    monkeypatch.setattr("vistok.data.store_writer.SPILL_SECONDS", 0)
    with StoreWriter(tmp_path / "b", plan) as writer:
        for batch in writer.pending[:stop]:
            writer.add(done(plan, batch, {1, 9}))
    assert json.loads((tmp_path / "b" / "quarantine.jsonl").read_text().splitlines()[0])["index"] == 1
    with pytest.raises(FormatError, match="is not finished"):
        TokenStore(tmp_path / "b")
    assert len(TokenStore(tmp_path / "b", partial=True)) in (0, 7, 14)
    with StoreWriter(tmp_path / "b", plan) as writer:
        assert writer.pending == list(range(stop, 6))
        for batch in writer.pending:
            writer.add(done(plan, batch, {1, 9}))
        writer.finish()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_damaged_parts_and_leftovers_are_encoded_again(tmp_path, monkeypatch):
    plan = manifest()
    write(tmp_path / "a", plan)
    monkeypatch.setattr("vistok.data.store_writer.SPILL_SECONDS", 0)
    with StoreWriter(tmp_path / "b", plan) as writer:
        writer.add(done(plan, 0))
        writer.add(done(plan, 2))
    part = tmp_path / "b" / PARTS / "000000002.parquet"
    part.write_bytes(part.read_bytes()[:50])
    (tmp_path / "b" / ".tokens-00000-of-00003.parquet.x.tmp").write_bytes(b"half")
    (tmp_path / "b" / LOCK).touch()
    with StoreWriter(tmp_path / "b", plan) as writer:
        assert writer.pending == [1, 2, 3, 4, 5]
        for batch in writer.pending:
            writer.add(done(plan, batch))
        writer.finish()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_shard_of_bad_items_alone(tmp_path):
    bad = set(range(8, 16))
    write(tmp_path / "s", manifest(), bad=bad)
    store = TokenStore(tmp_path / "s")
    assert store.index == [index for index in range(23) if index not in bad]
    assert store[7:10].index.tolist() == [7, 16, 17]
    import pyarrow.parquet as pq

    names = [pq.read_schema(path).names for path in sorted(store.path.glob("*.parquet"))]
    assert names[0] == names[1] == names[2]
    with StoreWriter(tmp_path / "s", manifest()) as writer:
        assert writer.pending == []
        assert writer.finish().quarantined == 8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokenizer": Source("other", "1" * 32)}, r"another tokenizer: 'toy' \(weights 00000000\), now 'other'"),
        ({"tokenizer": replace(MADE_BY, dtype="bfloat16")}, "another tokenizer dtype: float32, now bfloat16"),
        ({"options": {"crop": 32}}, "another option crop: None, now 32"),
        ({"batch_size": 5}, "another batch_size: 4, now 5"),
        ({"source": {**manifest().source, "fingerprint": "g", "items": 24}}, "23 items.*now p .folder, 24 items"),
    ],
)
def test_another_command_is_refused(store, changes, told):
    before = contents(store.path)
    with pytest.raises(MismatchError, match=told), StoreWriter(store.path, manifest(**changes)):
        pass
    assert contents(store.path) == before


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"holds other files \(mine.txt"), StoreWriter(tmp_path / "f", manifest()):
        pass
    with pytest.raises(OutputError, match="is a file"), StoreWriter(tmp_path / "f" / "mine.txt", manifest()):
        pass
    with pytest.raises(FormatError, match="is not a token store"):
        remove_store(tmp_path / "f")
    write(tmp_path / "s", manifest())
    (tmp_path / "s" / "notes.txt").write_text("kept")
    remove_store(tmp_path / "s")
    assert list(contents(tmp_path / "s")) == ["notes.txt"]


def test_one_writer_at_a_time(tmp_path):
    with (
        StoreWriter(tmp_path / "s", manifest()),
        pytest.raises(OutputError, match="written by another process"),
        StoreWriter(tmp_path / "s", manifest()),
    ):
        pass
    with StoreWriter(tmp_path / "s", manifest()) as writer:
        assert len(writer.pending) == 6


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    from vistok.data import store_writer

    plan = manifest()
    write(tmp_path / "a", plan, bad={2})
    monkeypatch.setattr(store_writer, "SPILL_SECONDS", 0)
    whole = store_writer.write_atomically
    left = [4]

    def full(path, content):
        left[0] -= 1
        if left[0] < 0:
            raise OutputError(f"cannot write {path}: No space left on device")
        whole(path, content)

    for _ in range(20):
        left[0] = 3
        monkeypatch.setattr(store_writer, "write_atomically", full)
        with contextlib.suppress(OutputError), StoreWriter(tmp_path / "b", plan) as writer:
            for batch in writer.pending:
                writer.add(done(plan, batch, {2}))
            writer.finish()
            break
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_damage_is_noticed(store):
    shard = store.path / "tokens-00001-of-00003.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    with pytest.raises(FormatError, match=r"tokens-00001.*its bytes are not those"):
        TokenStore(store.path).check()
    shard.write_bytes(data[:-9])
    with pytest.raises(FormatError, match="tokens-00001"):
        TokenStore(store.path)
    shard.unlink()
    with pytest.raises(FormatError, match=r"tokens-00001.*is missing"):
        TokenStore(store.path)


def test_manifests(store, tmp_path):
    path = store.path / "manifest.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"vistok_store": 99}))
    with pytest.raises(FormatError, match=r"of version 99.*upgrade"):
        TokenStore(store.path)
    for wrong in ("{", "[]", '{"vistok_store": 1}'):
        path.write_text(wrong)
        with pytest.raises(FormatError):
            TokenStore(store.path)
    with pytest.raises(FormatError, match="is not a token store"):
        TokenStore(tmp_path)


def test_random_access_keeps_little_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("vistok.data.store_writer.ROWS_PER_GROUP", 2)
    monkeypatch.setattr("vistok.data.store.CACHE_BYTES", 1)
    write(tmp_path / "s", manifest())
    store = TokenStore(tmp_path / "s")
    order = np.random.RandomState(0).permutation(23).tolist()
    assert store[order].index.tolist() == order
    assert store[torch.tensor(order)].ids == [f"id/{n}" for n in order]
    assert len(store._cache) == 1


def test_stores_of_version_1_keep_loading(tmp_path):
    sample = Path(__file__).parent / "samples" / "store-v1"
    shutil.copytree(sample, tmp_path / "s")
    store = TokenStore(tmp_path / "s")
    store.check()
    assert len(store) == 21
    assert store[4:9].tokens.equal(Tokens.cat([some_codes(4, seed=1)[[0, 2, 3]], some_codes(4, seed=2)[[0, 1]]]))
    assert store[4].captions == ["picture 4"]
    assert store.quarantine[1]["error"] == "no 22"
