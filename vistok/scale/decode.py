"""A token store back to image files or clips, one per item, named by its id; run again it goes on where it stopped.

    store --rows--> Tokens, grouped by layout and canvas --model--> uint8 pixels --threads--> DIR/<id>.png
    store of clips --a row--> Tokens --model, a window at a time--> DIR/<id>.mp4

Rows are always decoded in the same groups, so that an interrupted run writes the same pixels as an uninterrupted one.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from vistok.data.images import FORMATS, is_image_name, is_video_name, read_image, write_image
from vistok.data.store import Rows, TokenStore
from vistok.data.video import WRITTEN
from vistok.errors import InputError, MismatchError, OutputError, VistokError
from vistok.files import write_atomically
from vistok.layout import Canvas
from vistok.scale.clips import decode_clip, is_whole_clip
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

RECORD = ".vistok-decode.json"
REFERENCE_AREA = 256**2  # a batch holds batch_size pictures of this size, or fewer larger ones


@dataclass(frozen=True)
class DecodeReport:
    """What a decoding run did."""

    items: int
    written: int
    kept: int


def decode_store(
    store: TokenStore,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    length: int | None = None,
    suffix: str | None = None,
    batch_size: int = 32,
    workers: int = 4,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DecodeReport:
    """Write every item of `store` into `folder`; outputs that exist whole from an earlier run are kept.

    `length`: decode this prefix of the tokens. `suffix`: of the files; ".png", or ".mp4" for a store of clips.
    Raises MismatchError for another tokenizer's store or a folder with the outputs of another store or length,
    OutputError for files that are there and were not written by this,
    InputError for a length that does not decode.
    """
    clips = store.manifest.source["kind"] == "clips"
    suffix = suffix or (".mp4" if clips else ".png")
    if suffix not in (WRITTEN if clips else FORMATS):
        kind = "clips are written to" if clips else "pictures are written to"
        raise InputError(f"no {suffix!r} file; {kind} {' '.join(WRITTEN if clips else FORMATS)}")
    if store.made_by.weights != tokenizer.fingerprint:
        raise MismatchError(
            f"{store.path} was made by {store.made_by.name!r} (weights {store.made_by.weights[:8]}), not by "
            f"{tokenizer.name!r} (weights {tokenizer.fingerprint[:8]}); load the model that made it"
        )
    if tokenizer.spec.needs.decode and tokenizer.spec.needs.decode != ("text",):
        raise InputError(f"{tokenizer.name} cannot decode without {', '.join(tokenizer.spec.needs.decode)}")
    folder = Path(folder)
    files = [folder / name for name in file_names(store.ids, suffix)]
    _claim(folder, files, _record(store, length, suffix), overwrite)
    _remove_leftovers([folder / RECORD, *files])
    if clips:
        return _decode_clips(store, tokenizer, files, length, overwrite, progress)
    whole = [not overwrite and _is_whole(file) for file in files]
    done = sum(whole)
    progress(done, len(files))
    with ThreadPoolExecutor(workers, thread_name_prefix="vistok-write") as pool:
        writing: list[Future] = []
        for first in range(0, len(store), batch_size):
            span = range(first, min(first + batch_size, len(store)))
            if all(whole[row] for row in span):
                continue
            for task in writing:
                task.result()
            writing = []
            for rows, pixels in _decoded(store[span.start : span.stop], tokenizer, length, batch_size):
                for row, image in zip(rows, pixels, strict=True):
                    if not whole[first + row]:
                        writing.append(pool.submit(write_image, files[first + row], image))
                        done += 1
            progress(done, len(files))
        for task in writing:
            task.result()
    return DecodeReport(items=len(files), written=len(files) - sum(whole), kept=sum(whole))


def _decode_clips(
    store: TokenStore,
    tokenizer: Tokenizer,
    files: list[Path],
    length: int | None,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> DecodeReport:
    """One clip after the other."""
    written = 0
    for row, file in enumerate(files):
        tokens = store[row].tokens
        assert isinstance(tokens, Tokens)
        if overwrite or not is_whole_clip(file, tokens.canvas[0] if tokens.canvas else None):
            decode_clip(tokenizer, tokens if length is None else tokens.prefix(length), file)
            written += 1
        progress(row + 1, len(files))
    return DecodeReport(items=len(files), written=written, kept=len(files) - written)


def file_names(ids: list[str], suffix: str) -> list[str]:
    """A file name per id: an image's or a clip's ending replaced, or kept before the new one where names would clash.

    Raises InputError for an id that leads out of the folder.
    """
    stems = []
    for name in ids:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or not path.name or ":" in path.parts[0]:
            raise InputError(f"the store's id {name!r} is no file name within a folder")
        named = is_image_name(path.name) or is_video_name(path.name)
        stems.append(str(path.with_suffix("")) if named else str(path))
    files = [stem if count == 1 else name for stem, name, count in zip(stems, ids, _times(stems), strict=True)]
    if max(_times(files), default=1) > 1:
        files = ids
    if (most := max(_times(files), default=1)) > 1:
        raise InputError(f"{most} ids differ in nothing but upper and lower case: {files[_times(files).index(most)]!r}")
    return [file + suffix for file in files]


def _times(names: list[str]) -> list[int]:
    """How often each name occurs; many file systems ignore case, so this does."""
    count = Counter(name.lower() for name in names)
    return [count[name.lower()] for name in names]


def _decoded(
    rows: Rows, tokenizer: Tokenizer, length: int | None, batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Pixels, uint8 (b, C, H, W), of all rows in groups of one layout and canvas, bounded in pixels."""
    groups: dict[Any, list[int]] = {}
    singles = rows.tokens if isinstance(rows.tokens, list) else None
    for row in range(len(rows)):
        tokens = singles[row] if singles else rows.tokens
        canvas = tokens.canvas[row if not singles else 0] if tokens.canvas else None  # type: ignore[union-attr]
        key = (canvas, tokens.segments, tokens.length)  # type: ignore[union-attr]
        groups.setdefault(key, []).append(row)
    for (canvas, _, _), members in groups.items():
        area = _area(canvas or Canvas(tokenizer.spec.size), tokenizer.spec.output.scale)
        step = max(1, batch_size * REFERENCE_AREA // area)
        for start in range(0, len(members), step):
            chosen = members[start : start + step]
            tokens = Tokens.cat([singles[row] for row in chosen]) if singles else rows.tokens[chosen]  # type: ignore
            conditions: dict[str, Any] = {}
            if "text" in tokenizer.spec.needs.decode:
                if rows.captions is None:
                    raise InputError(f"{tokenizer.name} cannot decode without text, and the store has no captions")
                conditions["text"] = [rows.captions[row] for row in chosen]
            cut = tokens if length is None else tokens.prefix(length)
            yield chosen, tokenizer.decode(cut, dtype=torch.uint8, **conditions).cpu()


def _area(canvas: Canvas, scale: float) -> int:
    height, width = canvas.coded
    return max(1, round(height * width * scale * scale))


def _record(store: TokenStore, length: int | None, suffix: str) -> dict[str, Any]:
    shards = [shard["sha256"] for shard in store.manifest.shards]
    return {"vistok_decode": 1, "weights": store.made_by.weights, "shards": shards, "length": length, "suffix": suffix}


def _claim(folder: Path, files: list[Path], record: dict[str, Any], overwrite: bool) -> None:
    """Note in the folder what it holds, or refuse where it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder")
    path = folder / RECORD
    known = None
    if path.exists():
        with suppress(OSError, ValueError):
            known = json.loads(path.read_bytes())
    if known == record:
        return
    if not overwrite:
        if known is not None:
            differs = next(key for key in record if not isinstance(known, dict) or known.get(key) != record[key])
            raise MismatchError(
                f"{folder} holds the outputs of another store, tokenizer or length ({differs} differs); "
                "choose another folder, or replace them with --overwrite"
            )
        there = next((file for file in files if file.exists()), None)
        if there is not None:
            raise OutputError(f"{there} exists and was not written by this command; --overwrite replaces it")
    write_atomically(path, (json.dumps(record) + "\n").encode())


def _remove_leftovers(files: list[Path]) -> None:
    """Temporary files of these, left by a process that was killed while it wrote them."""
    names = set(files)
    for folder in {file.parent for file in files}:
        for path in folder.glob(".*.tmp") if folder.is_dir() else ():
            if path.with_name(path.name[1:].rsplit(".", 2)[0]) in names:  # .NAME.random.tmp
                path.unlink(missing_ok=True)


def _is_whole(file: Path) -> bool:
    if not file.exists():
        return False
    try:
        read_image(file)
    except VistokError:
        return False
    return True
