"""Reading and writing safetensors files: agreement with the format's own library, and every kind of damage."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from vistok import tensorfile
from vistok.errors import FormatError, InputError


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(300, 1000),  # several chunks and a last row that is not full
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(5),
        "d": torch.tensor(2.5),
        "e": torch.zeros(0, 3),
        "f": torch.tensor([True, False, True]),
        "g": torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    }


def test_files_are_the_librarys_files(tensors, tmp_path):
    tensorfile.write(tmp_path / "ours", tensors)
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    read, _ = tensorfile.read(tmp_path / "theirs")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)


def test_writing_and_reading_see_the_same_checksum(tensors, tmp_path):
    written = tensorfile.write(tmp_path / "file", tensors)
    assert tensorfile.read(tmp_path / "file")[1] == written
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    targets["c"] = torch.empty(5, dtype=torch.int32)  # of another type: read through a temporary one
    assert tensorfile.read_into(tmp_path / "file", targets) == written
    assert all(torch.equal(targets[name], tensors[name].to(targets[name].dtype)) for name in tensors)


def test_every_bit_counts(tensors, tmp_path):
    path = tmp_path / "file"
    written = tensorfile.write(path, tensors)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in [start, start + 4095, start + (1 << 18) + 3, len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        assert tensorfile.read(path)[1] != written


def test_exchanged_words_are_seen(tmp_path):
    a = torch.arange(2048.0)
    b = a.clone()
    b[0], b[2] = a[2], a[0]
    assert tensorfile.write(tmp_path / "a", {"x": a}) != tensorfile.write(tmp_path / "b", {"x": b})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda c: c[:-5], "cut short"),
        (lambda c: c[:4], "damaged or not a safetensors file"),
        (lambda c: c + b"x", "followed by other bytes"),
        (lambda c: b"", "damaged or not a safetensors file"),
        (lambda c: (1 << 62).to_bytes(8, "little") + c[8:], "its header would be 4611686018427387904 bytes"),
        (lambda c: c[:8] + b"\x80" + c[9:], "damaged or not a safetensors file"),
        (lambda c: c.replace(b"[300,1000]", b"[300,9000]"), "not where its header says"),
        (lambda c: c.replace(b"BF16", b"QQ16"), "unknown type 'QQ16'"),
        (lambda c: c.replace(b"[300,1000]", b"[300,-100]"), "impossible shape"),
        (lambda c: b"PK\x03\x04 a zip archive of some length, nothing else", "damaged or not a safetensors file"),
    ],
)
def test_damage_is_named(tensors, tmp_path, damage, told):
    path = tmp_path / "file"
    tensorfile.write(path, tensors)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=told):
        tensorfile.read(path)


def test_what_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(InputError, match="complex64"):
        tensorfile.write(tmp_path / "file", {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(FormatError, match="does not exist"):
        tensorfile.entries(tmp_path / "nothing")
