"""A whole data set through a tokenizer into a store, exactly once, at the model's speed.

    source --read, decode ahead--> pixels, in order --model: a batch at a time--> Tokens --thread: write--> store

Batch k always holds the same items, and the model always sees them in the same groups: pictures that share a canvas
go together, at most 64 * 256 * 256 pixels at a time (larger pictures in smaller groups), and a picture that
cannot be read leaves its place to a blank one, whose tokens are dropped. So neither an interruption nor a bad
neighbour changes an item's tokens. Memory is bounded: pictures wait in at most AHEAD_BYTES (`data.readahead`). Clips
are encoded alone, window by window (`scale.clips`).
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch

from vistok.data.clips import check_takes_clips
from vistok.data.decoding import CutOut, Decoded
from vistok.data.items import Item, Source
from vistok.data.loader import allowed_bad
from vistok.data.readahead import decode_ahead
from vistok.data.store import Manifest, table_of
from vistok.data.store_writer import Done, StoreWriter
from vistok.errors import InputError
from vistok.layout import Canvas, Size
from vistok.pixels import OnSize, plan
from vistok.scale.clips import encode_clips
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

SHARD_ITEMS = 8192
SHARD_VALUES = 2**27  # codes or floats, so that the largest stores still have shards of some hundred megabytes
REFERENCE_SIDE = 256
AT_ONCE = 64  # pictures of that side in one call of the model
WAITING_WRITES = 4
BATCH = 256  # items that are written together
CLIP_BATCH = 1  # the same of clips, each of which is many pictures
SHARD_CLIPS = 256


@dataclass(frozen=True)
class EncodeOptions:
    """How a data set is encoded. All but `max_bad` and `workers` belong to the store and must agree on resuming.

    batch_size: items that are written together; the model sees small pictures so, larger ones in smaller groups (clips
    one by one: CLIP_BATCH loses least when killed). crop:
    cut the middle square out, scaled to this side, before anything else. seed: item i draws with seed + i, where a
    tokenizer draws at all. shard_items: about how many items a shard holds.
    """

    batch_size: int = BATCH
    on_size: OnSize = "pad"
    crop: int | None = None
    seed: int = 0
    shard_items: int = SHARD_ITEMS
    max_bad: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}; expected at least 1")
        if self.shard_items < 1:
            raise InputError(f"shard_items={self.shard_items}; expected at least 1")
        if self.on_size not in get_args(OnSize):
            raise InputError(f"on_size={self.on_size!r}; expected {' or '.join(get_args(OnSize))}")
        if self.crop is not None and self.crop < 1:
            raise InputError(f"crop={self.crop}; expected at least 1 pixel")

    def stored(self) -> dict[str, Any]:
        """Those that the manifest keeps besides the batch size."""
        return {"on_size": self.on_size, "crop": self.crop, "seed": self.seed}


@dataclass(frozen=True)
class Report:
    """What an encoding run did."""

    items: int
    rows: int
    quarantined: int
    encoded_now: int  # items of this run; the others were there already
    seconds: float
    shards: int
    bytes: int


def encode_source(
    source: Source,
    tokenizer: Tokenizer,
    path: str | Path,
    options: EncodeOptions = EncodeOptions(),
    progress: Callable[[int, int], None] = lambda done, bad: None,
    engine: "Engine | None" = None,
) -> Report:
    """Encode every item of `source` into the store at `path`, or finish a store that the same call began.

    `progress(done, bad)` is called after each batch with counts over all runs. `engine` encodes the batches: this
    process unless given; `scale.ray_engine.RayEngine` is another. A store begun by one may be finished by another.
    Raises InputError when more pictures are bad than `options.max_bad` allows (what is done is kept, and the call can
    be repeated), MismatchError for a store of another call, OutputError when it cannot be written.
    """
    began = time.monotonic()
    engine = engine or BatchEncoder
    encoder = engine(source, tokenizer, options)
    allowed = allowed_bad(len(source), options.max_bad)
    with StoreWriter(path, plan_store(source, tokenizer, options)) as writer:
        pending = writer.pending
        total = len(source) - sum(len(writer.plan.items_of(batch)) for batch in pending)
        start = total
        progress(total, len(writer.bad))
        _check_bad(writer, allowed)
        for batch in _written(encoder.run(pending, writer.plan), writer):
            total += len(writer.plan.items_of(batch))
            progress(total, len(writer.bad))
            _check_bad(writer, allowed)
        manifest = writer.finish()
    return Report(
        items=manifest.items,
        rows=manifest.rows,
        quarantined=manifest.quarantined,
        encoded_now=total - start,
        seconds=time.monotonic() - began,
        shards=len(manifest.shards),
        bytes=sum(shard["bytes"] for shard in manifest.shards),
    )


def plan_store(source: Source, tokenizer: Tokenizer, options: EncodeOptions) -> Manifest:
    """The manifest of the store that these would make, before anything is encoded."""
    per_item = sum(part.count * (len(part.codebooks) or part.dim or 1) for part in tokenizer.spec.segments)
    most = min(options.shard_items, SHARD_CLIPS) if source.kind == "clips" else options.shard_items
    items = max(1, min(most, SHARD_VALUES // per_item))
    return Manifest(
        tokenizer=tokenizer.source,
        source={
            "kind": source.kind,
            "name": source.name,
            "items": len(source),
            "fingerprint": source.fingerprint,
            "classes": list(source.classes),
            "labelled": source.labelled,
            "captioned": source.captioned,
        },
        options=options.stored(),
        batch_size=options.batch_size,
        batches_per_shard=max(1, items // options.batch_size),
    )


def _check_bad(writer: StoreWriter, allowed: int) -> None:
    if len(writer.bad) > allowed:
        first = writer.bad[min(writer.bad)]
        raise InputError(
            f"{len(writer.bad)} items cannot be read, more than the {allowed} allowed (max_bad); "
            f"the first: {first['error']}; {writer.path / 'quarantine.jsonl'} lists them; what is done is kept: "
            "run the same command again with a higher limit or mended files to go on"
        )


def _written(encoded: "Iterable[Batch]", writer: StoreWriter) -> Iterator[int]:
    """Store batches in a thread of its own while the next are encoded; yields the numbers of those stored."""
    waiting: queue.Queue[Batch | None] = queue.Queue(WAITING_WRITES)
    stored: deque[int] = deque()
    failed: list[BaseException] = []

    def write() -> None:
        while (batch := waiting.get()) is not None:
            if failed:
                continue  # empty the queue, so that the encoder is never stuck on it
            try:
                writer.add(batch.done())
                stored.append(batch.batch)
            except BaseException as error:
                failed.append(error)

    thread = threading.Thread(target=write, name="vistok-write")
    thread.start()
    try:
        for batch in encoded:
            waiting.put(batch)
            while stored:
                yield stored.popleft()
            if failed:
                break
    finally:
        waiting.put(None)
        thread.join()
    if failed:
        raise failed[0]
    while stored:
        yield stored.popleft()


class Batch(Protocol):
    """An encoded batch of whatever engine."""

    batch: int

    def done(self) -> Done:
        """As the store takes it."""


class Encoder(Protocol):
    """What an engine makes of a source, a tokenizer and options: batches by their numbers, in any order."""

    def run(self, batches: Sequence[int], plan: Manifest) -> Iterator[Any]:
        """Each of these batches of `plan`, as a `Batch`."""


Engine = Callable[[Source, Tokenizer, EncodeOptions], Encoder]


@dataclass
class Encoded:
    """A batch as it comes from the model, perhaps still computing on its device."""

    batch: int
    parts: list[tuple[list[int], Tokens]]  # places in the batch, their tokens
    index: list[int]
    ids: list[str]
    labels: list[int | None] | None
    captions: list[str | None] | None
    bad: list[dict[str, Any]]

    def done(self) -> Done:
        """As the store takes it. Waits for the device."""
        table = table_of(self.parts, self.index, self.ids, self.labels, self.captions)
        return Done(self.batch, table.sort_by("index") if len(self.parts) > 1 else table, self.bad)


class BatchEncoder:
    """Encodes batches of a source: what a store holds, without the store. Any engine drives it; order is free."""

    def __init__(self, source: Source, tokenizer: Tokenizer, options: EncodeOptions = EncodeOptions()) -> None:
        self.source, self.tokenizer, self.options = source, tokenizer, options
        spec = tokenizer.spec
        if source.kind == "clips":
            check_takes_clips(tokenizer, source.name)
        elif spec.modality not in ("image", "mask") and spec.clips is None:
            raise InputError(f"{tokenizer.name} encodes {spec.modality}s; a store of images needs an image tokenizer")
        unknown = [need for need in spec.needs.encode if need != "text" or not source.captioned]
        if unknown:
            raise InputError(f"{tokenizer.name} cannot encode without {unknown[0]}, which {source.name} does not have")
        self._pixels_at_once = min(options.batch_size, AT_ONCE) * REFERENCE_SIDE**2
        self._prepare = CutOut(options.crop, tokenizer.input_channels)
        self._canvases: dict[Size, Canvas | str] = {}

    def run(self, batches: Iterable[int], plan: Manifest) -> Iterator["Encoded"]:
        """Encode these batches of `plan`, decoding ahead (`data.readahead`)."""
        spans = [(batch, plan.items_of(batch)) for batch in batches]
        if self.source.kind == "clips":
            for batch, span in spans:
                yield self._clips(batch, span)
            return
        decoded = decode_ahead(
            self.source,
            (index for _, span in spans for index in span),
            self._prepare,
            self.options.workers,
            expected=sum(len(span) for _, span in spans),
        )
        try:
            for batch, span in spans:
                yield self._batch(batch, islice(decoded, len(span)))
        finally:
            decoded.close()

    def _canvas(self, size: Size) -> Canvas | str:
        """The canvas for pictures of this size, or why there is none."""
        if size not in self._canvases:
            try:
                self._canvases[size] = plan(size, self.tokenizer.spec.sizes, self.options.on_size)
            except InputError as refused:
                self._canvases[size] = str(refused)
        return self._canvases[size]

    def _batch(self, batch: int, decoded: Iterable[Decoded]) -> "Encoded":
        groups = _Groups(self._pixels_at_once)
        items: list[Item] = []
        index: list[int] = []
        bad: list[dict[str, Any]] = []
        parts: list[tuple[list[int], Tokens]] = []
        for place, one in enumerate(decoded):
            items.append(one.item)
            index.append(one.index)
            error = one.error
            if one.pixels is not None:
                canvas = self._canvas(one.pixels.shape[:2])
                if isinstance(canvas, Canvas):
                    full = groups.add(place, canvas, one.pixels)
                else:
                    error = f"{one.item.id}: {canvas}"
            if error is not None:
                bad.append({"index": one.index, "id": one.item.id, "error": error})
                full = groups.add_blank()
            parts += [self._encode(group, index, items) for group in full if group.real]
        parts += [self._encode(group, index, items) for group in groups.rest() if group.real]
        return self._encoded(batch, parts, index, items, bad)

    def _clips(self, batch: int, span: range) -> "Encoded":
        """A batch of clips, one by one."""
        how = self.options
        items, parts, bad = encode_clips(
            self.source, span, self.tokenizer, on_size=how.on_size, crop=how.crop, seed=how.seed
        )
        return self._encoded(batch, parts, list(span), items, bad)

    def _encoded(
        self,
        batch: int,
        parts: list[tuple[list[int], Tokens]],
        index: list[int],
        items: list[Item],
        bad: list[dict[str, Any]],
    ) -> "Encoded":
        return Encoded(
            batch,
            [part for part in parts if part[0]],
            index,
            [item.id for item in items],
            [item.label for item in items] if self.source.labelled else None,
            [item.caption for item in items] if self.source.captioned else None,
            bad,
        )

    def _encode(self, group: "_Group", index: list[int], items: list[Item]) -> tuple[list[int], Tokens]:
        """Tokens of a group's real pictures, and their places in the batch."""
        real = [row for row, place in enumerate(group.places) if place is not None]
        places = [place for place in group.places if place is not None]
        rows = [places[0] if place is None else place for place in group.places]
        conditions: dict[str, Any] = {}
        if "text" in self.tokenizer.spec.needs.encode:
            conditions["text"] = [items[row].caption or "" for row in rows]
        tokens = self.tokenizer.encode(
            torch.from_numpy(np.stack(group.pixels)).permute(0, 3, 1, 2),
            on_size=self.options.on_size,
            seed=[self.options.seed + index[row] for row in rows],
            **conditions,
        )
        return places, tokens if len(real) == len(rows) else tokens[real]


@dataclass
class _Group:
    """Pictures of one canvas that the model sees together; a place is None where a blank fills in."""

    places: list[int | None]
    pixels: list[np.ndarray]

    @property
    def real(self) -> bool:
        """Whether it holds anything but blanks."""
        return any(place is not None for place in self.places)


class _Groups:
    """Sorts a batch's pictures by canvas and says when a group is full. What it does depends on their sizes alone."""

    def __init__(self, pixels_at_once: int) -> None:
        self._limit = pixels_at_once
        self._waiting: dict[Canvas, _Group] = {}
        self._held = 0  # pixels in all groups
        self._last: tuple[Canvas, np.ndarray] | None = None
        self._owed = 0  # blanks before the first readable picture

    def add(self, place: int, canvas: Canvas, pixels: np.ndarray) -> list[_Group]:
        self._last = (canvas, pixels)
        full = []
        for _ in range(self._owed):
            full += self._put(None, canvas, np.zeros_like(pixels))
        self._owed = 0
        return full + self._put(place, canvas, pixels)

    def add_blank(self) -> list[_Group]:
        """A bad item: a blank of the size of the picture before it, or of the next one if it is the first."""
        if self._last is None:
            self._owed += 1
            return []
        canvas, pixels = self._last
        return self._put(None, canvas, np.zeros_like(pixels))

    def rest(self) -> list[_Group]:
        groups, self._waiting, self._held = list(self._waiting.values()), {}, 0
        return groups

    def _put(self, place: int | None, canvas: Canvas, pixels: np.ndarray) -> list[_Group]:
        group = self._waiting.setdefault(canvas, _Group([], []))
        group.places.append(place)
        group.pixels.append(pixels)
        area = pixels.shape[0] * pixels.shape[1]
        self._held += area
        if (len(group.places) + 1) * area > self._limit:
            self._held -= len(group.places) * area
            return [self._waiting.pop(canvas)]
        return self.rest() if self._held > 4 * self._limit else []
