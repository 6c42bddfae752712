"""Silhouettes of a mesh written on the spot."""

import numpy as np
import pytest
from PIL import Image

from vistok.data.silhouettes import silhouettes, surface, write_silhouettes
from vistok.errors import FormatError

CUBE = """v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\nv 1 0 1\nv 1 1 1\nv 0 1 1
f 1 3 2\nf 1 4 3\nf 5 6 7\nf 5 7 8\nf 1 2 6\nf 1 6 5\nf 2 3 7\nf 2 7 6\nf 3 4 8\nf 3 8 7\nf 4 1 5\nf 4 5 8\n"""


def test_views_of_a_cube_are_whole_and_between_its_smallest_and_largest_shadow(tmp_path):
    (tmp_path / "cube.obj").write_text(CUBE)
    points = surface(tmp_path / "cube.obj")
    assert points.shape == (20_000, 3)
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=1e-6)
    masks = silhouettes(points, 8, 64, np.random.RandomState(0))
    side = 64 * 2 / 3**0.5  # of a cube whose corner lies at distance 1, before the scale
    for mask in masks:
        assert 0.8 * (0.30 * side) ** 2 < mask.sum() < 1.2 * 3**0.5 * (0.46 * side) ** 2
    assert set(masks.unique().tolist()) == {0, 1}


def test_files_and_seeds(tmp_path):
    (tmp_path / "cube.obj").write_text(CUBE)
    meshes = [tmp_path / "cube.obj"] * 2
    first = write_silhouettes(meshes, tmp_path / "a", 5, size=32, seed=1)
    again = write_silhouettes(meshes, tmp_path / "b", 5, size=32, seed=1)
    assert len(first) == 5
    assert Image.open(first[0]).size == (32, 32)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, again, strict=True))


def test_no_mesh(tmp_path):
    (tmp_path / "broken.obj").write_bytes(b"\x00\x01")
    with pytest.raises(FormatError):
        surface(tmp_path / "broken.obj")
