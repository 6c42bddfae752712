"""Captions of the pictures of a folder: a .txt of the same name beside a picture, or a table of JSON lines.

    a/0001.jpg, a/0001.txt                                                the text of the file
    captions.jsonl or metadata.jsonl: {"file_name": "0001.jpg", "text": ".."}   names are within the table's own folder

"caption" and "prompt" count as "text" does. A .txt beside the picture goes before a table.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from vistok.data.remote import AnyPath
from vistok.errors import FormatError

TABLES = ("captions.jsonl", "metadata.jsonl")
KEYS = ("text", "caption", "prompt")


class Captions:
    """The captions of `pictures` among the files below `root`; texts are read when they are asked for.

    Raises FormatError for a table that is not JSON line by line.
    """

    def __init__(self, root: AnyPath, pictures: Iterable[str], files: Iterable[str]) -> None:
        self._root = root
        there = list(files)
        texts = {file for file in there if file.lower().endswith(".txt")}
        self._beside = {
            picture: text for picture in pictures if (text := f"{PurePosixPath(picture).with_suffix('')}.txt") in texts
        }
        self._table = {
            name: text for file in there if PurePosixPath(file).name in TABLES for name, text in self._rows(file)
        }

    def __bool__(self) -> bool:
        return bool(self._beside or self._table)

    def of(self, picture: str) -> str | None:
        """The caption of a picture, by its path below the root, or None."""
        if picture not in self._beside:
            return self._table.get(picture)
        try:
            return (self._root / self._beside[picture]).read_bytes().decode("utf-8", "replace").strip()
        except OSError as error:
            raise FormatError(f"{self._beside[picture]} cannot be read: {error.strerror or error}") from error

    def _rows(self, file: str) -> Iterator[tuple[str, str]]:
        folder = PurePosixPath(file).parent
        lines = (self._root / file).read_bytes().decode("utf-8", "replace").splitlines()
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FormatError(f"{file}, line {number + 1} is no JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                continue
            text = next((row[key] for key in KEYS if isinstance(row.get(key), str)), None)
            if text is not None:
                yield (folder / row["file_name"]).as_posix(), text.strip()
