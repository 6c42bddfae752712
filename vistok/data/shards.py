"""WebDataset shards: .tar files in which neighbouring members of one key are one sample.

    000000001.jpg 000000001.txt 000000001.json   ->   Item("shard/000000001", caption from .txt or .json)

The headers of all shards are read once; pictures are then read from their place in the file, in any order.
"""

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vistok.data.images import IMAGE_SUFFIXES
from vistok.data.items import Item, Source, within
from vistok.data.remote import AnyPath, read_span
from vistok.errors import FormatError, InputError

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """A member's data within its shard, in bytes."""

    start: int
    size: int


class Sample(NamedTuple):
    """One key: its id, its shard, and where each of its parts lies."""

    id: str
    shard: int
    picture: Span
    text: Span | None
    json: Span | None
    cls: Span | None


class WebDatasetSource(Source):
    """Samples of .tar shards; ids are `shard/key` (a key that comes again in its shard gets `~2`, `~3`, ...)."""

    kind = "webdataset"

    def __init__(self, paths: Sequence[AnyPath], root: AnyPath, max_pixels: int | None = None) -> None:
        self.name = paths[0].stem if len(paths) == 1 else root.name
        self._paths, self._root, self._max_pixels = list(paths), root, max_pixels
        self._samples: list[Sample] = []
        for number, path in enumerate(self._paths):
            self._samples += _index(path, number, within(path, root))
        if not self._samples:
            raise InputError(f"{paths[0]} holds no images; expected members that end in {' '.join(IMAGE_SUFFIXES[:6])}")
        first = next((sample for sample in self._samples if sample.json), None)
        facts = self._json(first) if first else {}
        self.labelled = any(sample.cls for sample in self._samples) or _label(facts) is not None
        self.captioned = any(sample.text for sample in self._samples) or _caption(facts) is not None

    def __len__(self) -> int:
        return len(self._samples)

    def item(self, index: int) -> Item:
        sample = self._samples[index]
        facts = self._json(sample) if sample.json else {}
        label, caption = _label(facts), _caption(facts)
        if sample.cls:
            text = self._read(sample, sample.cls).decode("utf-8", "replace").strip()
            label = int(text) if text.isdigit() else None
        if sample.text:
            caption = self._read(sample, sample.text).decode("utf-8", "replace").strip()
        return Item(sample.id, lambda: self._picture(sample), label, caption, self._max_pixels)

    def _picture(self, sample: Sample) -> bytes:
        data = self._read(sample, sample.picture)
        if len(data) < sample.picture.size:
            raise FormatError(f"{sample.id}: the shard ends in the middle of this picture")
        return data

    def _read(self, sample: Sample, span: Span) -> bytes:
        path = self._paths[sample.shard]
        try:
            return read_span(path, span.start, span.size)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error

    def _json(self, sample: Sample) -> dict[str, Any]:
        try:
            facts = json.loads(self._read(sample, sample.json or Span(0, 0)))
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}

    def _contents(self) -> Iterator[str]:
        for path in self._paths:
            yield f"{within(path, self._root)} {path.stat().st_size}"
        for sample in self._samples:
            yield f"{sample.id} {sample.picture.size}"


def _index(path: AnyPath, number: int, name: str) -> Iterator[Sample]:
    """Samples of one shard. A shard that is cut short gives those before the cut."""
    times: Counter[str] = Counter()
    key, parts = None, dict[str, Span]()

    def sample() -> Iterator[Sample]:
        picture = next((parts[suffix] for suffix in parts if suffix in IMAGE_SUFFIXES), None)
        if key is not None and picture is not None:
            times[key] += 1
            again = f"~{times[key]}" if times[key] > 1 else ""
            yield Sample(
                f"{name}/{key}{again}", number, picture, parts.get(".txt"), parts.get(".json"), parts.get(".cls")
            )

    for member in _members(path):
        folder, _, file = member.name.rpartition("/")
        if not member.isfile() or file.startswith("."):
            continue
        stem, dot, suffix = file.partition(".")  # the key ends at the first dot, as in webdataset
        member_key = f"{folder}/{stem}" if folder and folder != "." else stem
        if member_key != key:
            yield from sample()
            key, parts = member_key, {}
        parts[(dot + suffix).lower()] = Span(member.offset_data, member.size)
    yield from sample()


def _members(path: AnyPath) -> Iterator[tarfile.TarInfo]:
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            read = 0
            while True:
                try:
                    member = tar.next()
                except tarfile.TarError as error:
                    if not read:
                        raise
                    log.warning("%s is cut short or damaged after %d members: %s", path, read, error)
                    return
                if member is None:
                    return
                read += 1
                tar.members.clear()  # type: ignore[attr-defined]  # or a long shard's headers are all kept
                yield member
    except (tarfile.TarError, OSError) as error:
        raise FormatError(f"{path} is not a .tar file or is damaged: {error}") from error


def _caption(facts: dict[str, Any]) -> str | None:
    text = next((facts[key] for key in ("caption", "text", "prompt") if isinstance(facts.get(key), str)), None)
    return text


def _label(facts: dict[str, Any]) -> int | None:
    return next((facts[key] for key in ("label", "class_id", "cls") if type(facts.get(key)) is int), None)
