import json

import numpy as np
import pytest

import tests.toy  # noqa: F401
import vistok
from tests.data.test_store import contents
from vistok.data.importers import grid_layout, import_store, layout_of, open_codes, sequence_layout
from vistok.data.store import TokenStore
from vistok.errors import FormatError, InputError
from vistok.layout import Segment
from vistok.tokens import Source

RNG = np.random.RandomState(0)


@pytest.fixture
def llamagen(tmp_path):
    """12 files of a crop and its mirror, as LlamaGen's extract_codes_c2i leaves them."""
    codes, labels = tmp_path / "imagenet256_codes", tmp_path / "imagenet256_labels"
    codes.mkdir()
    labels.mkdir()
    for number in range(12):
        np.save(codes / f"{number}.npy", RNG.randint(0, 16384, (1, 2, 256)))
        np.save(labels / f"{number}.npy", np.array([number * 7]))
    return codes


def test_llamagen(tmp_path, llamagen):
    codes = open_codes(tmp_path)  # the folder above serves as well
    assert (codes.kind, len(codes), codes.labelled) == ("llamagen", 24, True)
    ids = [item.id for item in codes]
    assert ids[:3] == ["0/0", "0/1", "1/0"]
    assert ids[-1] == "11/1"  # 11 after 2
    assert [item.label for item in codes][-2:] == [77, 77]
    made_by = Source("llamagen-vq-16", "f" * 32)
    tokens = codes.tokens([3, 0], grid_layout(16384, 256, made_by=made_by))
    assert tokens["grid"].shape == (2, 16, 16)
    assert np.array_equal(tokens.codes[0], np.load(llamagen / "1.npy")[0, 1])
    assert tokens.canvas[0].size == (256, 256)
    import_store(codes, tmp_path / "s", layout=grid_layout(16384, 256, made_by=made_by))
    rows = TokenStore(tmp_path / "s")[[3, 0]]
    assert rows.tokens.equal(tokens)
    assert rows.tokens.source == made_by
    assert rows.labels.tolist() == [7, 0]


def test_jsonl(tmp_path):
    lines = [{"class_id": n, "tokens": RNG.randint(0, 4096, 32).tolist()} for n in range(5)]
    path = tmp_path / "pretokenized.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    codes = open_codes(path)
    assert [item.label for item in codes] == list(range(5))
    import_store(codes, tmp_path / "s", layout=sequence_layout(4096, 32))
    rows = TokenStore(tmp_path / "s")[:]
    assert rows.tokens.segments == (Segment("latent", (32,), (4096,)),)
    assert rows.tokens.codes.tolist() == [line["tokens"] for line in lines]
    assert rows.labels.tolist() == list(range(5))
    (tmp_path / "pretokenized_0.json").write_text(json.dumps(lines))
    assert [item.codes.tolist() for item in open_codes(tmp_path / "pretokenized_0.json")] == rows.tokens.codes.tolist()


def test_4m(tmp_path):
    root = tmp_path / "rgb_tok"
    saved = {}
    for folder in ("n02", "n01"):
        (root / folder).mkdir(parents=True)
        for name in ("b", "a"):
            saved[f"{folder}/{name}"] = RNG.randint(0, 65000, (3, 196))
            np.save(root / folder / f"{name}.npy", saved[f"{folder}/{name}"].astype(np.int16))
    codes = open_codes(root)
    assert (codes.kind, len(codes), codes.classes) == ("4m", 12, ("n01", "n02"))
    items = list(codes)
    assert [items[n].id for n in (0, 5, 11)] == ["n01/a/0", "n01/b/2", "n02/b/2"]
    assert [items[n].label for n in (0, 11)] == [0, 1]
    for item in items:
        name, crop = item.id.rsplit("/", 1)
        assert np.array_equal(item.codes, saved[name][int(crop)])  # those above 32767 had wrapped around
    assert codes.tokens([0], grid_layout(65536, 196))["grid"].shape == (1, 14, 14)


def test_a_tokenizer_gives_layout_and_name(tmp_path):
    toy = vistok.create("toy", levels=8)
    toy.spec = type(toy.spec)(
        size=(16, 16),
        layout=lambda size: (Segment("grid", (size[0] // 4, size[1] // 4), (8,)),),
        sizes=toy.spec.sizes,
    )
    assert layout_of(toy, 16).canvas.size == (16, 16)
    assert layout_of(toy, 64).canvas.size == (32, 32)
    with pytest.raises(InputError, match="at no square size 15"):
        layout_of(toy, 15)
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "0.npy", RNG.randint(0, 8, (1, 1, 64)))
    import_store(open_codes(tmp_path / "c"), tmp_path / "s", tokenizer=toy)
    store = TokenStore(tmp_path / "s")
    assert store.made_by == toy.source
    assert store.ids == ["0"]


def test_damaged_and_foreign_files_go_to_quarantine(tmp_path, llamagen):
    (llamagen / "3.npy").write_bytes((llamagen / "3.npy").read_bytes()[:200])
    np.save(llamagen / "4.npy", RNG.randint(16384, 20000, (1, 2, 256)))
    np.save(llamagen / "5.npy", RNG.randint(0, 9, (1, 2, 100)))
    np.save(llamagen / "6.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    codes = open_codes(llamagen)
    import_store(codes, tmp_path / "s", layout=grid_layout(16384, 256))
    store = TokenStore(tmp_path / "s")
    told = {entry["id"]: entry["error"] for entry in store.quarantine}
    assert sorted(told) == ["3/0", "3/1", "4/0", "4/1", "5/0", "5/1", "6"]
    assert "outside a codebook of 16384" in told["4/0"]
    assert "has 100 codes; expected 256" in told["5/1"]
    assert len(store) == 16
    before = contents(tmp_path / "s")
    import_store(codes, tmp_path / "s", layout=grid_layout(16384, 256))
    assert contents(tmp_path / "s") == before
    with pytest.raises(InputError, match="7 unreadable items, more than the 6 allowed"):
        import_store(codes, tmp_path / "t", layout=grid_layout(16384, 256), max_bad=6)


def test_what_is_not_there(tmp_path, llamagen):
    with pytest.raises(InputError, match="does not exist"):
        open_codes(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.npy files"):
        open_codes(tmp_path / "empty")
    (tmp_path / "a.jsonl").write_text('{"class_id": 1}\nnot json\n{"tokens": ["a"]}\n')
    codes = open_codes(tmp_path / "a.jsonl")
    for index, told in enumerate(["expected an object with `tokens`", "is not JSON", "not a list of integers"]):
        with pytest.raises(FormatError, match=told):
            codes.item(index)
    with pytest.raises(InputError, match="no square grid"):
        grid_layout(8, 15)
    with pytest.raises(InputError, match="either the tokenizer"):
        import_store(open_codes(llamagen), tmp_path / "s")
