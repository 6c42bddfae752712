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


def as_written(path, pixels, rate):
    """What a reader finds of frames (1, 3, T, H, W) that were written to `path`: H.264 loses some of them."""
    write_clip(path, [pixels], rate=rate)
    return read_clip(path)[0]
