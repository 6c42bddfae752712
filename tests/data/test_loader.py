import itertools
import threading

import numpy as np
import pytest
import torch

from tests.data.pictures import encoded, folder, parquet, picture
from vistok.data.loader import AHEAD, PixelLoader, allowed_bad, center_crop, window
from vistok.data.sources import open_source
from vistok.errors import InputError


def same(a, b):
    assert a.keys() == b.keys()
    assert torch.equal(a["pixels"], b["pixels"])
    assert a["id"] == b["id"]
    assert "label" not in a or torch.equal(a["label"], b["label"])
    assert a.get("caption") == b.get("caption")


@pytest.fixture
def pictures(tmp_path):
    return folder(tmp_path / "p", 11, size=(20, 28), classes=2)


def test_a_batch_has_the_promised_parts(pictures, tmp_path):
    batch = PixelLoader(pictures, size=16, batch_size=4, seed=0).batch(0)
    assert batch["pixels"].shape == (4, 3, 16, 16)
    assert batch["pixels"].dtype == torch.float32
    assert 0 <= float(batch["pixels"].min()) < float(batch["pixels"].max()) <= 1
    assert batch["label"].tolist() == [int(name[1]) for name in batch["id"]]
    assert "caption" not in batch
    table = parquet(tmp_path / "a.parquet", 4, caption=["a", "b", "c", None])
    batch = PixelLoader(table, size=16, batch_size=4, seed=0, flip=False).batch(0)
    assert sorted(batch["caption"]) == ["", "a", "b", "c"]
    assert batch["label"].dtype == torch.long


def test_batches_are_a_function_of_seed_and_step(pictures):
    loader = PixelLoader(pictures, size=12, batch_size=4, seed=3, scale=(0.5, 1), workers=3)
    run = list(itertools.islice(loader.batches(), 8))
    for step in (0, 3, 7):
        same(run[step], PixelLoader(pictures, size=12, batch_size=4, seed=3, scale=(0.5, 1)).batch(step))
    for resumed, before in zip(itertools.islice(loader.batches(5), 3), run[5:], strict=True):
        same(resumed, before)
    same(next(PixelLoader(pictures, size=12, batch_size=4, seed=3, scale=(0.5, 1), workers=0).batches(2)), run[2])
    other = PixelLoader(pictures, size=12, batch_size=4, seed=4, scale=(0.5, 1)).batch(0)
    assert not torch.equal(other["pixels"], run[0]["pixels"])


def test_an_epoch_holds_every_item_once_in_numpys_order(pictures):
    loader = PixelLoader(pictures, size=8, batch_size=4, seed=5)
    ids = [name for step in range(6) for name in loader.batch(step)["id"]]
    source = open_source(pictures)
    for epoch in (0, 1):
        order = np.random.RandomState(5 + epoch).permutation(11)
        assert ids[epoch * 11 : epoch * 11 + 11] == [source[int(i)].id for i in order]


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_does_not_depend_on_world(pictures, world):
    options = {"size": 8, "batch_size": 8, "seed": 1, "scale": (0.3, 1.0)}
    whole = PixelLoader(pictures, **options).batch(2)
    parts = [PixelLoader(pictures, **options, rank=rank, world=world).batch(2) for rank in range(world)]
    assert torch.equal(torch.cat([part["pixels"] for part in parts]), whole["pixels"])
    assert [name for part in parts for name in part["id"]] == whole["id"]


def test_corrupt_pictures_are_replaced_by_the_next_and_counted(pictures):
    source = open_source(pictures)
    (pictures / source[4].id).write_bytes(b"\x89PNG broken")
    loader = PixelLoader(pictures, size=8, batch_size=11, seed=2)
    ids = loader.batch(0)["id"]
    order = [source[int(i)].id for i in np.random.RandomState(2).permutation(11)]
    at = order.index(source[4].id)
    assert ids == [*order[:at], order[(at + 1) % 11], *order[at + 1 :]]
    loader.batch(1)
    assert list(loader.bad) == [source[4].id]
    assert source[4].id in loader.bad[source[4].id]
    with pytest.raises(InputError, match="1 unreadable pictures in p, more than the 0 allowed"):
        PixelLoader(pictures, size=8, batch_size=11, seed=2, max_bad=0).batch(0)


def test_a_source_of_ruins_ends(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"no")
    with pytest.raises(InputError, match="not one of the 3 pictures"):
        next(PixelLoader(tmp_path, size=8, batch_size=2, seed=0).batches())


def test_crops(tmp_path):
    wide = picture(1, (16, 32))
    assert np.array_equal(center_crop(wide, 16), np.asarray(wide)[:, 8:24])
    assert np.array_equal(window(wide, 16, across=0.0), np.asarray(wide)[:, :16])
    assert np.array_equal(window(wide, 16, across=1.0), np.asarray(wide)[:, 16:])
    assert window(wide, 40).shape == (40, 40, 3)
    assert window(picture(1, (1, 1)), 8).shape == (8, 8, 3)
    half = window(wide, 8)
    assert np.abs(half.astype(int) - np.asarray(wide)[::2, 8:24:2].astype(int)).max() < 60


def test_flips_are_mirror_images(pictures):
    plain = PixelLoader(pictures, size=12, batch_size=11, seed=0, flip=False).batch(0)["pixels"]
    flipped = PixelLoader(pictures, size=12, batch_size=11, seed=0, flip=True).batch(0)["pixels"]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    equal = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(m != e for m, e in zip(mirrored, equal, strict=True))
    assert any(mirrored)
    assert any(equal)


def test_large_jpegs_are_decoded_small_and_still_large_enough(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(0, (400, 600)), "JPEG"))
    item = open_source(tmp_path)[0]
    assert item.decoded_to(100).size == (150, 100)
    assert min(item.decoded_to(101).size) >= 101
    assert item.size == (400, 600)
    assert PixelLoader(tmp_path, size=64, batch_size=1, seed=0, scale=(0.25, 0.3)).batch(0)["pixels"].shape[-1] == 64


def test_decoding_runs_a_bounded_number_of_batches_ahead(pictures, monkeypatch):
    loader = PixelLoader(pictures, size=8, batch_size=2, seed=0, workers=2)
    taken, whole = [], loader.picture
    monkeypatch.setattr(loader, "picture", lambda step, place: taken.append(step) or whole(step, place))
    run = loader.batches()
    for step in range(4):
        next(run)
        assert max(taken) <= step + AHEAD + 1
    before = threading.active_count()
    run.close()
    assert threading.active_count() <= before - 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"crop": "left"}, "expected 'random' or 'center'"),
        ({"batch_size": 3, "world": 2}, "must divide"),
        ({"scale": (0.0, 2.0)}, "expected 0 < low"),
        ({"seed": -1}, "seed=-1"),
        ({"size": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_named(pictures, wrong, told):
    with pytest.raises(InputError, match=told):
        PixelLoader(pictures, **{"size": 8, "batch_size": 4, "seed": 0, **wrong})


def test_allowance():
    assert [allowed_bad(5), allowed_bad(5_000), allowed_bad(5_000, 3)] == [10, 50, 3]
