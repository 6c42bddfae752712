"""Batches from stores: rows in an order of their own, shared over ranks, and stores that a generator cannot learn."""

import pytest
import torch

from tests.data.test_store import GRID, MADE_BY, manifest, some_codes, write
from vistok.data.sources import open_source
from vistok.data.store import table_of
from vistok.data.store_writer import Done, StoreWriter
from vistok.data.token_loader import StoreSource, TokenLoader, is_store
from vistok.errors import FormatError, InputError
from vistok.layout import Segment


@pytest.fixture
def store(tmp_path):
    """20 rows of two columns of codes, with labels and captions; three items of the source were unreadable."""
    write(tmp_path / "store", manifest(), bad=(2, 5, 9))
    return tmp_path / "store"


def test_batches_are_rows_in_an_order_of_their_own(store):
    source = StoreSource(store)
    loader = TokenLoader(source, batch_size=4, seed=3)
    seen = [name for step in range(5) for name in loader.batch(step)["id"]]
    assert sorted(seen) == sorted(source.store.ids)
    assert seen != source.store.ids
    assert loader.steps_per_epoch == 5
    batch = loader.batch(2)
    again = next(TokenLoader(StoreSource(store), batch_size=4, seed=3).batches(2))
    assert batch["id"] == again["id"]
    assert batch["tokens"].equal(again["tokens"])
    assert loader.batch(7)["id"] != loader.batch(2)["id"]  # of the next epoch
    for row, name in enumerate(batch["id"]):
        place = source.store.ids.index(name)
        assert torch.equal(batch["tokens"].codes[row], source.store[place].tokens.codes[0])
        assert batch["label"][row] == source.store[place].labels[0]
        assert batch["caption"][row] == source.store[place].captions[0]
    assert batch["tokens"].segments == GRID
    assert batch["tokens"].source == MADE_BY


def test_ranks_share_the_batch(store):
    whole = TokenLoader(StoreSource(store), batch_size=6, seed=1).batch(1)["id"]
    parts = [TokenLoader(StoreSource(store), batch_size=6, seed=1, rank=rank, world=2) for rank in (0, 1)]
    assert [name for part in parts for name in part.batch(1)["id"]] == whole
    for wrong in ({"batch_size": 6, "world": 4}, {"batch_size": 0}, {"batch_size": 2, "rank": 1}):
        with pytest.raises(InputError, match="batch_size"):
            TokenLoader(StoreSource(store), **wrong)
    with pytest.raises(InputError, match="seed"):
        TokenLoader(StoreSource(store), batch_size=2, seed=-1)


def test_some_rows_are_a_source_of_their_own(store):
    whole = StoreSource(store)
    part = whole.chosen([5, 2, 9])
    assert len(part) == 3
    assert part.batch([1])["id"] == [whole.store.ids[2]]
    assert part.chosen([2]).batch([0])["id"] == [whole.store.ids[9]]
    assert len({whole.fingerprint, part.fingerprint, whole.chosen([5, 2]).fingerprint}) == 3
    assert StoreSource(store).fingerprint == whole.fingerprint
    assert (whole.classes, whole.labelled, whole.captioned) == (("a", "b"), True, True)


def test_a_store_has_no_pictures(store, tmp_path):
    assert is_store(store)
    assert not is_store(tmp_path)
    with pytest.raises(InputError, match="token store"):
        StoreSource(store)[0]
    with pytest.raises(InputError, match="token store"):
        open_source(store)
    with pytest.raises(FormatError, match="not a token store"):
        StoreSource(tmp_path)


@pytest.mark.parametrize("kind", ["prefix", "layout"])
def test_a_generator_learns_whole_sequences_of_one_layout(kind, tmp_path):
    plan = manifest(items=4, batch_size=2, batches_per_shard=2)
    with StoreWriter(tmp_path / "store", plan) as writer:
        for batch in writer.pending:
            tokens = some_codes(2, seed=batch)
            if batch == 1:
                other = (Segment("grid", (3, 3), (8, 5)),)
                tokens = some_codes(2, other) if kind == "layout" else tokens.prefix(4)
            span = list(plan.items_of(batch))
            names = [f"id/{index}" for index in span]
            writer.add(Done(batch, table_of([(range(2), tokens)], span, names, [0, 1], ["", ""])))
        writer.finish()
    told = "several layouts" if kind == "layout" else "id/2 has 4 of 6 tokens"
    with pytest.raises(InputError, match=told):
        StoreSource(tmp_path / "store").batch([0])
