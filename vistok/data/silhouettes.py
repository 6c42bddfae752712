"""Silhouettes of 3D meshes: masks of known shape for training and testing tokenizers of masks without any annotation.

    mesh files -> points on their surfaces -> turned, scaled, moved at random -> projected -> holes closed -> PNG masks

Views are orthographic. Surfaces are read and sampled by trimesh.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vistok.errors import FormatError, MissingExtraError
from vistok.losses.segmentation import dilate, erode

POINTS = 20_000
REACH = (0.30, 0.46)  # radius of the shape, of the picture's side
SHIFT = 0.12  # of its centre, either way


def surface(path: str | Path, points: int = POINTS, seed: int = 0) -> np.ndarray:
    """Points (P, 3) on a mesh's surface, centred, the farthest at distance 1. Raises FormatError, MissingExtraError."""
    try:
        import trimesh
    except ImportError as error:
        raise MissingExtraError("reading meshes needs trimesh: pip install vistok[data]") from error
    try:
        mesh = trimesh.load(str(path), force="mesh")
        found, _ = trimesh.sample.sample_surface(mesh, points, seed=seed)
    except Exception as error:  # trimesh raises whatever its parsers meet
        raise FormatError(f"{path} cannot be read as a mesh: {error}") from error
    found = np.asarray(found, np.float64)
    found -= (found.min(0) + found.max(0)) / 2
    return (found / np.linalg.norm(found, axis=1).max()).astype(np.float32)


def silhouettes(points: np.ndarray, count: int, size: int, rng: np.random.RandomState) -> Tensor:
    """Masks (count, 1, size, size), zeros and ones, of points (P, 3) from random views."""
    masks = np.zeros((count, size * size), np.float32)
    for row in range(count):
        quaternion = rng.standard_normal(4)
        w, x, y, z = quaternion / np.linalg.norm(quaternion)
        turn = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            ]
        )
        flat = points @ turn.T * rng.uniform(*REACH) + 0.5 + rng.uniform(-SHIFT, SHIFT, 2)
        cells = np.floor(flat * size).astype(np.int64)
        inside = ((cells >= 0) & (cells < size)).all(1)
        masks[row, cells[inside, 1] * size + cells[inside, 0]] = 1
    found = torch.from_numpy(masks).view(count, 1, size, size)
    return erode(dilate(found, 3), 3)


def write_silhouettes(
    meshes: Iterable[str | Path], folder: str | Path, count: int, *, size: int = 64, seed: int = 0
) -> list[Path]:
    """Write `count` mask PNGs into `folder`, as many views of each mesh; their names tell mesh and view."""
    from PIL import Image

    paths: Sequence[Path] = [Path(mesh) for mesh in meshes]
    rng, folder = np.random.RandomState(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for place, path in enumerate(paths):
        share = count * (place + 1) // len(paths) - count * place // len(paths)
        for view, mask in enumerate(silhouettes(surface(path), share, size, rng)):
            file = folder / f"{path.stem}-{view:05d}.png"
            Image.fromarray((mask[0].numpy() * 255).astype(np.uint8)).save(file)
            written.append(file)
    return written
