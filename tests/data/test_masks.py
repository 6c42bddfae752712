"""Masks in files: index PNGs, COCO's run lengths, boxes."""

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.masks import as_pixels, boxes_of, from_boxes, from_rle, read_index, to_rle, write_index
from vistok.errors import FormatError, InputError


def test_index_png_there_and_back(tmp_path):
    one, two = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    one[2:9, 3:11], two[12:, 20:] = True, True
    for indices in ((1, 7), (1, 300)):
        path = tmp_path / "masks.png"
        write_index(path, dict(zip(indices, (one, two), strict=True)))
        found = read_index(path)
        assert list(found) == list(indices)
        assert all((found[index] == mask).all() for index, mask in zip(indices, (one, two), strict=True))
    assert Image.open(path).mode.startswith("I;16")
    assert as_pixels(found.values()).shape == (2, 1, 20, 30)


def test_void_is_left_out_and_black_and_white_is_one_mask(tmp_path):
    array = np.zeros((8, 8), np.uint8)
    array[2:4], array[5:] = 3, 255
    Image.fromarray(array).save(tmp_path / "voc.png")
    assert list(read_index(tmp_path / "voc.png")) == [3, 255]
    assert list(read_index(tmp_path / "voc.png", void=255)) == [3]


def test_what_cannot_be_an_index_png(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    with pytest.raises(FormatError, match="colours"):
        read_index(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(FormatError, match="cannot be read"):
        read_index(tmp_path / "text.png")
    mask = np.ones((4, 4), bool)
    for masks in ({}, {0: mask}, {70000: mask}, {1: mask, 2: np.ones((3, 3), bool)}, {1: mask, 2: mask}):
        with pytest.raises(InputError):
            write_index(tmp_path / "bad.png", masks)
    assert not (tmp_path / "bad.png").exists()
    write_index(tmp_path / "layers.png", {1: mask, 2: mask}, overlap=True)
    assert list(read_index(tmp_path / "layers.png")) == [2]
    with pytest.raises(InputError):
        as_pixels([])


def test_run_lengths_as_cocos_own_tools_write_them():
    """The text is what pycocotools gives for this mask."""
    mask = np.zeros((9, 13), bool)
    mask[2:7, 3:10] = True
    assert to_rle(mask) == {"size": [9, 13], "counts": "m05400000000000i0"}
    assert to_rle(mask, compressed=False)["counts"] == [29, 5, *[4, 5] * 6, 29]


@pytest.mark.parametrize("compressed", [True, False])
def test_run_lengths_there_and_back(compressed):
    rng = np.random.RandomState(0)
    shapes = [(1, 1), (5, 9), (200, 170), (0, 4)]
    for shape in shapes:
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = rng.random_sample(shape) < share
            assert (from_rle(to_rle(mask, compressed=compressed)) == mask).all()


def test_torn_run_lengths():
    whole = to_rle(np.eye(40, dtype=bool))
    for damaged in (
        {"size": [40, 40], "counts": whole["counts"][:-3]},
        {"size": [40, 40], "counts": whole["counts"] + "\x7f"},
        {"size": [40, 40], "counts": whole["counts"][:1] + "o"},
        {"size": [41, 40], "counts": whole["counts"]},
        {"size": [2, 2], "counts": [5, -1]},
        {"counts": [4]},
        {"size": None, "counts": [4]},
    ):
        with pytest.raises(FormatError):
            from_rle(damaged)


def test_boxes_of_masks_and_masks_of_boxes():
    boxes = torch.tensor([[3, 2, 11, 9], [0, 0, 30, 20], [29, 19, 30, 20]])
    masks = from_boxes(boxes, (20, 30))
    assert masks.shape == (3, 1, 20, 30)
    assert masks.sum((1, 2, 3)).tolist() == [56, 600, 1]
    assert torch.equal(boxes_of(masks), boxes)
    assert boxes_of(torch.zeros(1, 1, 5, 5)).tolist() == [[0, 0, 0, 0]]
    with pytest.raises(InputError):
        from_boxes(torch.zeros(4), (5, 5))
