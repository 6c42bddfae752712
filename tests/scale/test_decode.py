import numpy as np
import pytest
from PIL import Image

import tests.toy  # noqa: F401
import vistok
from tests.data.pictures import encoded, folder, picture
from tests.data.test_store import contents
from vistok.data.images import read_image
from vistok.data.sources import open_source
from vistok.data.store import TokenStore
from vistok.errors import InputError, MismatchError, OutputError
from vistok.pixels import to_pil
from vistok.scale.decode import decode_store, file_names
from vistok.scale.encode import EncodeOptions, encode_source


@pytest.fixture
def toy():
    return vistok.create("toy")


@pytest.fixture
def store(tmp_path, toy):
    folder(tmp_path / "p", 7, size=(16, 16), classes=2)
    folder(tmp_path / "p" / "c0", 3, size=(10, 20), start=50)
    encode_source(open_source(tmp_path / "p"), toy, tmp_path / "s", EncodeOptions(batch_size=4))
    return TokenStore(tmp_path / "s")


def test_pictures_are_named_by_id_and_are_the_reconstructions(tmp_path, store, toy):
    report = decode_store(store, toy, tmp_path / "out", batch_size=4)
    assert (report.items, report.written, report.kept) == (10, 10, 0)
    for rows in store.batches(1):
        made = read_image(tmp_path / "out" / rows.ids[0])
        source = read_image(tmp_path / "p" / rows.ids[0])
        assert made.size == source.size
        expected = to_pil(toy.decode(toy.encode(source)))
        assert np.abs(np.asarray(made).astype(int) - np.asarray(expected)).max() <= 1


def test_what_is_there_and_whole_is_kept(tmp_path, store, toy):
    decode_store(store, toy, tmp_path / "whole", batch_size=4)
    decode_store(store, toy, tmp_path / "out", batch_size=4)
    paths = [tmp_path / "out" / name for name in store.ids]
    paths[1].unlink()
    paths[6].write_bytes(paths[6].read_bytes()[:40])
    paths[9].write_bytes(b"")
    (tmp_path / "out" / "c0" / ".0000.png.x1_y2z3w.tmp").write_bytes(b"half")
    (tmp_path / "out" / "..vistok-decode.json.abc.tmp").write_bytes(b"half")
    (tmp_path / "out" / "c0" / ".mine.tmp").touch()
    times = [path.stat().st_mtime_ns if path.exists() else None for path in paths]
    report = decode_store(store, toy, tmp_path / "out", batch_size=4)
    assert (report.written, report.kept) == (3, 7)
    (tmp_path / "out" / "c0" / ".mine.tmp").unlink()  # fails if it was taken for ours
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert [paths[n].stat().st_mtime_ns == times[n] for n in (0, 2, 8)] == [True] * 3


def test_other_outputs_are_refused_unless_overwritten(tmp_path, store, toy):
    (tmp_path / "out" / "c0").mkdir(parents=True)
    (tmp_path / "out" / "c0" / "0000.png").write_bytes(encoded(picture(0)))
    with pytest.raises(OutputError, match=r"0000\.png exists and was not written by this"):
        decode_store(store, toy, tmp_path / "out")
    assert decode_store(store, toy, tmp_path / "out", overwrite=True).written == 10
    with pytest.raises(MismatchError, match="suffix differs"):
        decode_store(store, toy, tmp_path / "out", suffix=".webp")
    with pytest.raises(OutputError, match="is a file"):
        decode_store(store, toy, tmp_path / "out" / "c0" / "0000.png")


def test_lengths_and_models_that_do_not_fit(tmp_path, store, toy):
    with pytest.raises(InputError, match="do not decode on their own"):
        decode_store(store, toy, tmp_path / "out", length=3)
    with pytest.raises(InputError, match=r"no '\.xyz' file"):
        decode_store(store, toy, tmp_path / "out", suffix=".xyz")
    other = vistok.create("toy")
    other.encoder.gain.data.fill_(0.5)
    with pytest.raises(MismatchError, match="was made by 'toy'"):
        decode_store(store, other, tmp_path / "out")


def test_prefixes(tmp_path, toy):
    from dataclasses import replace

    from vistok.tokenizer import TokenData

    class Ordered(type(toy)):
        def detokenize(self, data, spec, *, seeds, dtype, **conditions):
            import torch

            missing = spec.length - data.codes.shape[1]
            codes = torch.nn.functional.pad(data.codes, (0, 0, 0, missing))
            return super().detokenize(TokenData(codes), spec, seeds=seeds, dtype=dtype, **conditions)

    ordered = Ordered(toy.config)
    ordered.spec = replace(ordered.spec, prefix_rule="any")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "a.png")
    encode_source(open_source(tmp_path / "a.png"), ordered, tmp_path / "s")
    decode_store(TokenStore(tmp_path / "s"), ordered, tmp_path / "out", length=8)
    made = np.asarray(read_image(tmp_path / "out" / "a.png"))
    assert made[:8].min() == 255
    assert made[8:].max() == 0


def test_names():
    assert file_names(["a/b.jpg", "c", "v1.5/x"], ".png") == ["a/b.png", "c.png", "v1.5/x.png"]
    assert file_names(["a.jpg", "A.png", "b.png"], ".png") == ["a.jpg.png", "A.png.png", "b.png"]
    clash = file_names(["a.jpg", "a.png", "a.jpg.jpg"], ".png")
    assert clash == ["a.jpg.png", "a.png.png", "a.jpg.jpg.png"]
    with pytest.raises(InputError, match="upper and lower case"):
        file_names(["x", "X"], ".png")
    for wrong in ("../x.png", "/etc/x", "a/../../x", "c:/x", "..\\x"):
        with pytest.raises(InputError, match="no file name within a folder"):
            file_names([wrong], ".png")
