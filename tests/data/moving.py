"""Small clips for tests: a bright square that wanders over a gradient."""

import numpy as np
import torch

from vistok.data.video import read_clip, write_clip


def moving(frames=13, height=48, width=64):
    """Frames uint8 (1, 3, T, H, W)."""
    grid = np.linspace(30, 200, width)[None, None, None] * np.ones((3, frames, height, 1))
    for index in range(frames):
        grid[:, index, 8:24, 2 * index : 2 * index + 16] = 250
    return torch.from_numpy(grid.astype(np.uint8))[None]


def clips(root, lengths, size=(32, 48), rate=10.0):
    """A folder of clips 00.mp4, 01.mp4, ... of so many frames."""
    root.mkdir(parents=True)
    for number, frames in enumerate(lengths):
        write_clip(root / f"{number:02d}.mp4", [moving(frames, *size)], rate=rate)
    return root


def cut_short(path, share=0.5):
    """Leave the first `share` of a file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def assert_written(path, found, wanted, rate):
    """Frames read from a file (1, 3, T, H, W) are those that H.264 makes of `wanted`; `path` is written to find out.

    Not to the bit: a level more or less in one decoded pixel, which batches and threads may cause, moves its
    neighbours in the file by some levels. Other frames differ by 70 levels on average.
    """
    write_clip(path, [wanted], rate=rate)
    again, _ = read_clip(path)
    assert found.shape == again.shape
    assert float((found.float() - again.float()).abs().mean()) < 4
