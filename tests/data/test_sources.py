import io
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.data.pictures import encoded, folder, parquet, picture, shard
from vistok.data.sources import open_source
from vistok.data.tables import ParquetSource
from vistok.errors import FormatError, InputError, VistokError

SHARED = os.path.join(os.path.dirname(__file__), "..", "..", "..", "shared", "data")


def pixels(source):
    return [np.asarray(item.image) for item in source]


def test_folders_are_nested_sorted_and_of_mixed_formats(tmp_path):
    folder(tmp_path / "b" / "deep", 2)
    folder(tmp_path / "a", 1)
    (tmp_path / "a" / "x.JPG").write_bytes(encoded(picture(1), "JPEG"))
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "._x.jpg").write_bytes(b"macOS leaves these")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "thumb.png").write_bytes(encoded(picture(1)))
    source = open_source(tmp_path)
    assert [item.id for item in source] == ["a/0000.png", "a/x.JPG", "b/deep/0000.png", "b/deep/0001.png"]
    assert [item.label for item in source] == [0, 0, 1, 1]
    assert source.classes == ("a", "b")
    assert source.labelled
    assert source[-1].size == (16, 16)
    assert source[-1].image.size == (16, 16)


def test_pictures_beside_subfolders_have_no_labels(tmp_path):
    folder(tmp_path / "sub", 1)
    folder(tmp_path, 1)
    source = open_source(tmp_path)
    assert not source.labelled
    assert [item.label for item in source] == [None, None]


def test_captions_lie_beside_pictures_or_in_a_table(tmp_path):
    folder(tmp_path, 3, classes=1)
    assert not open_source(tmp_path).captioned
    plain = open_source(tmp_path).fingerprint
    (tmp_path / "c0" / "0000.txt").write_text("  a red square\n")
    (tmp_path / "captions.jsonl").write_text(
        '{"file_name": "c0/0000.png", "text": "not this one"}\n\n{"file_name": "c0/0001.png", "caption": "blue"}\n[1]\n'
    )
    source = open_source(tmp_path)
    assert source.captioned
    assert [item.caption for item in source] == ["a red square", "blue", None]
    assert [item.caption for item in pickle.loads(pickle.dumps(source))] == ["a red square", "blue", None]
    assert source.fingerprint == plain, "tokens of these pictures are the same tokens"
    (tmp_path / "c0" / "metadata.jsonl").write_text('{"file_name": "0002.png", "prompt": "green"}')
    assert open_source(tmp_path)[2].caption == "green"
    (tmp_path / "captions.jsonl").write_text("{")
    with pytest.raises(FormatError, match=r"captions\.jsonl, line 1 is no JSON"):
        open_source(tmp_path)


def test_links_are_followed_once(tmp_path):
    folder(tmp_path / "real", 2)
    try:
        (tmp_path / "real" / "loop").symlink_to(tmp_path / "real", target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert len(open_source(tmp_path)) == 2


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path):
    folder(tmp_path, 2)
    (tmp_path / "0001.png").write_bytes(b"ruin")
    source = open_source(tmp_path)
    item = source[1]
    with pytest.raises(FormatError, match=r"0001\.png is not an image"):
        item.image  # noqa: B018
    with pytest.raises(FormatError, match=r"0001\.png"):
        item.size  # noqa: B018


def test_what_holds_no_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no images \(1 other files\)"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "gone")
    with pytest.raises(InputError, match="does not exist"):
        open_source("gone.parquet")
    with pytest.raises(InputError, match="no file matches"):
        open_source(str(tmp_path / "*.tar"))
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="unpack it"):
        open_source(tmp_path / "a.tar.gz")
    with pytest.raises(FormatError, match="is not an image"):
        open_source(tmp_path / "notes.txt")[0].image  # noqa: B018


def test_one_file_and_lists(tmp_path):
    folder(tmp_path, 3)
    assert [item.id for item in open_source(tmp_path / "0001.png")] == ["0001.png"]
    listed = open_source([tmp_path / "0002.png", tmp_path / "0000.png"])
    assert [item.id for item in listed] == ["0002.png", "0000.png"]
    with pytest.raises(InputError, match="given twice"):
        open_source([tmp_path / "0002.png"] * 2)
    with pytest.raises(InputError, match="several kinds"):
        open_source([tmp_path / "0002.png", tmp_path / "a.tar"])
    assert [item.id for item in open_source(str(tmp_path / "000{0,2}.png"))] == ["0000.png", "0002.png"]


def test_parquet_files(tmp_path):
    parquet(tmp_path / "data" / "a.parquet", 10, rows_per_group=4, caption=[f"no {n}" for n in range(10)])
    parquet(tmp_path / "data" / "b.parquet", 5, start=10, caption=["x"] * 5)
    source = open_source(tmp_path)
    assert (len(source), source.kind, source.labelled, source.captioned) == (15, "parquet", True, True)
    assert source[9].id == "data/a/000009"
    assert source[10].id == "data/b/000000"
    assert (source[7].label, source[7].caption) == (1, "no 7")
    for index in (0, 3, 4, 9, 10, 14):
        assert np.array_equal(np.asarray(source[index].image), np.asarray(picture(index)))
    assert len({item.id for item in source}) == 15
    with pytest.raises(IndexError):
        source[15]


def test_parquet_holds_few_row_groups_and_serves_threads(tmp_path):
    path = parquet(tmp_path / "a.parquet", 40, rows_per_group=4)
    source = ParquetSource([path], tmp_path, cache_bytes=1)
    with ThreadPoolExecutor(8) as pool:
        order = np.random.RandomState(0).permutation(40).tolist()
        got = list(pool.map(lambda index: np.asarray(source[index].image), order))
    assert all(np.array_equal(image, np.asarray(picture(index))) for index, image in zip(order, got, strict=True))
    assert len(source._cache) == 1


def test_parquet_of_other_shapes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"jpg": [encoded(picture(3))], "txt": [["first", "second"]]}), tmp_path / "raw.parquet")
    item = open_source(tmp_path / "raw.parquet")[0]
    assert item.caption == "first"
    assert item.image.size == (16, 16)
    (tmp_path / "x.png").write_bytes(encoded(picture(4)))
    linked = pa.table({"image": [{"bytes": None, "path": "x.png"}, {"bytes": None, "path": None}]})
    pq.write_table(linked, tmp_path / "linked.parquet")
    source = open_source(tmp_path / "linked.parquet")
    assert np.array_equal(np.asarray(source[0].image), np.asarray(picture(4)))
    with pytest.raises(FormatError):
        source[1].image  # noqa: B018
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "none.parquet")
    with pytest.raises(FormatError, match=r"no image column.*'a', 'b'"):
        open_source(tmp_path / "none.parquet")


def test_damaged_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", 8)
    data = bytearray(path.read_bytes())
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"cut\.parquet is not a parquet file or is damaged"):
        open_source(tmp_path / "cut.parquet")
    data[8:400] = bytes(392)  # within the first row group
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(VistokError):
        pixels(source)


def test_class_names_of_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({"image": [picture(0), picture(1)], "label": [1, 0]}, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source.classes == ("cat", "dog")
    made.save_to_disk(str(tmp_path / "saved"))
    saved = open_source(tmp_path / "saved")
    assert (saved.kind, saved.classes, saved[0].label, saved[1].id) == ("datasets", ("cat", "dog"), 1, "data/000001")
    assert np.array_equal(np.asarray(saved[1].image), np.asarray(picture(1)))
    assert saved.fingerprint == open_source(tmp_path / "saved").fingerprint


def test_datasets_that_cannot_be_opened(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(name, *config, split):
        raise ConnectionError(f"offline: {name} {config} {split}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"neither a path here nor a dataset.*offline: owner/name \('small',\) test"):
        open_source("owner/name:small:test")


def test_webdataset_shards(tmp_path):
    shard(tmp_path / "s" / "000.tar", 4)
    shard(tmp_path / "s" / "001.tar", 3, start=4)
    source = open_source(tmp_path / "s")
    assert (len(source), source.labelled, source.captioned) == (7, True, True)
    item = source[5]
    assert (item.id, item.label, item.caption) == ("001/00005", 1, "picture 5")
    assert all(np.array_equal(image, np.asarray(picture(n))) for n, image in enumerate(pixels(source)))
    assert len(open_source(str(tmp_path / "s" / "{000..001}.tar"))) == 7


def test_webdataset_json_captions_and_repeated_keys(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [
            ("x/1.a.png", encoded(picture(0))),
            ("x/2.json", b'{"caption": "told", "label": 7}'),
            ("x/2.jpg", encoded(picture(1), "JPEG")),
            ("x/3.txt", b"no picture here"),
            ("x/2.webp", encoded(picture(2), "WEBP")),
            ("x/4.json", b"not json"),
            ("x/4.webp", b"ruin"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source(tmp_path / "a.tar")
    assert [item.id for item in source] == ["a/x/2", "a/x/2~2", "a/x/4"]
    assert (source[0].caption, source[0].label) == ("told", 7)
    assert source[1].caption is None
    with pytest.raises(FormatError, match="a/x/4"):
        source[2].image  # noqa: B018


def test_webdataset_cut_short(tmp_path):
    whole = shard(tmp_path / "a.tar", 6).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    source = open_source(tmp_path / "a.tar")
    assert 1 <= len(source) < 6
    source[0].image  # noqa: B018
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    with pytest.raises(FormatError, match=r"b\.tar is not a \.tar file"):
        open_source(tmp_path / "b.tar")


def test_fingerprints_follow_contents_not_places(tmp_path):
    one = folder(tmp_path / "p", 3)
    before = open_source(one).fingerprint
    shutil.copytree(one, tmp_path / "q" / "p")
    assert open_source(tmp_path / "q" / "p").fingerprint == before
    assert open_source(one).first(2).fingerprint != before
    assert open_source(one).first(3).fingerprint == before
    folder(one, 1, start=3)
    assert open_source(one).fingerprint != before
    for made in (parquet(tmp_path / "a.parquet"), shard(tmp_path / "a.tar")):
        assert open_source(made).fingerprint == open_source(made).fingerprint != before


def test_the_first_items(tmp_path):
    source = open_source(folder(tmp_path, 5, classes=2)).first(2)
    assert [item.id for item in source] == ["c0/0000.png", "c0/0002.png"]
    assert source.classes == ("c0", "c1")
    with pytest.raises(InputError):
        source.first(0)


def test_sources_travel_to_other_processes(tmp_path):
    for made in (folder(tmp_path / "f", 3), parquet(tmp_path / "a.parquet", 3), shard(tmp_path / "a.tar", 3)):
        source = open_source(made)
        source[0].image  # noqa: B018
        copy = pickle.loads(pickle.dumps(source))
        assert copy[2].id == source[2].id
        assert np.array_equal(np.asarray(copy[2].image), np.asarray(source[2].image))


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [("cifar10/test.parquet", 7000, "parquet"), ("captions", 32, "webdataset"), ("kodak", 24, "folder")],
)
def test_real_data(name, count, kind):
    where = os.path.join(SHARED, name)
    if not os.path.exists(where):
        pytest.skip("the real data is not on this machine")
    source = open_source(where)
    assert source.kind == kind
    assert len(source) == count
    assert source[count - 1].image.mode == "RGB"
    assert source.labelled == (kind == "parquet")
    assert source.captioned == (kind == "webdataset")
