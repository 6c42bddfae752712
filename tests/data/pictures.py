"""Small folders, parquet files and shards of pictures for the tests of this room."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A smooth random picture, size (height, width)."""
    small = np.random.RandomState(seed).randint(0, 256, (3, 3, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def folder(root: Path, count: int = 10, size: tuple[int, int] = (16, 16), classes: int = 0, start: int = 0) -> Path:
    """`count` PNGs of one size, in subfolders c0, c1, ... where `classes` is given."""
    for number in range(start, start + count):
        below = root / f"c{number % classes}" if classes else root
        below.mkdir(parents=True, exist_ok=True)
        (below / f"{number:04d}.png").write_bytes(encoded(picture(number, size)))
    return root


def parquet(path: Path, count: int = 10, rows_per_group: int = 4, start: int = 0, **columns: list) -> Path:
    """A Hugging Face parquet file of PNGs with a label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": encoded(picture(n)), "path": f"{n}.png"} for n in range(start, start + count)]
    table = pa.table({"image": images, "label": [n % 3 for n in range(count)], **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def shard(path: Path, count: int = 6, start: int = 0) -> Path:
    """A WebDataset shard: .png, .txt, .json and .cls of each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(start, start + count):
            parts = {
                "json": json.dumps({"url": "x", "caption": "from json"}).encode(),
                "png": encoded(picture(number)),
                "txt": f"picture {number}".encode(),
                "cls": str(number % 2).encode(),
            }
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path
