"""`vistok encode`: every picture or clip of a source into a store, exactly once; run again, it finishes the rest."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json

if TYPE_CHECKING:
    from vistok.data.items import Source
    from vistok.scale.encode import EncodeOptions, Engine
    from vistok.tokenizer import Tokenizer


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images or of clips, one clip, parquet files, WebDataset .tar shards, a URL of these "
            "(s3://, gs://, ...), or a datasets id name[:split]."
        ),
    ],
    store: Annotated[Path, typer.Option("--output", "-o", help="The store's folder; an unfinished one is resumed.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A name, a model folder or a Hub id. Default: the one that ships."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Items written together. Default: 256 pictures (large ones go in fewer), or 1 clip."),
    ] = None,
    on_size: Annotated[
        str, typer.Option(help="What to do with sizes that do not fit: pad, refuse, resize, tile.")
    ] = "pad",
    crop: Annotated[int | None, typer.Option(min=1, help="Cut out the middle square, scaled to this side.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of the source.")] = None,
    max_bad: Annotated[
        int | None, typer.Option(min=0, help="Unreadable items before it stops. Default: 1 % or 10, whichever is more.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Refuse pictures of more pixels as bombs.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Noise of tokenizers that draw any: item i draws with seed + i.")
    ] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check all shards, encode a sample again and compare.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: a GPU if there is one.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: Ray Data on this machine or a cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray's cluster: auto, ray://host:10001. Default: Ray on this machine.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads; with ray, models at a time (one per GPU or core).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove a store that is there and begin anew.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Encode a data set into a token store.

    Killed at any moment and run again, the store comes out the same, bit for bit. Unreadable pictures and clips are
    listed in quarantine.jsonl. Clips go window by window; their size, frame count and rate are kept.
    """
    from vistok.cli.loading import load_tokenizer
    from vistok.data.sources import open_source
    from vistok.data.store_writer import holds_store, remove_store
    from vistok.scale.encode import BATCH, CLIP_BATCH, EncodeOptions, encode_source

    with_ray = _is_ray(engine, address)
    runner: Engine | None = None
    if with_ray:
        from vistok.extras import import_extra
        from vistok.scale.ray_engine import RayEngine

        import_extra("ray.data", "scale")  # said before anything is read
        runner = RayEngine(address, workers, None if device is None else device != "cpu")
    items = open_source(source, max_pixels=max_pixels)
    items = items.first(limit) if limit else items
    options = EncodeOptions(
        batch_size=batch_size or (CLIP_BATCH if items.kind == "clips" else BATCH),
        on_size=on_size,  # type: ignore[arg-type]
        crop=crop,
        seed=seed,
        max_bad=max_bad,
        workers=None if with_ray else workers,
    )
    tokenizer = load_tokenizer(model, "cpu" if with_ray and not verify else device)
    if overwrite and holds_store(store):
        remove_store(store)
    with bar("encode", len(items)) as advance:
        report = encode_source(items, tokenizer, store, options, progress=advance, engine=runner)
    facts: dict[str, Any] = {"store": str(store), "tokenizer": tokenizer.name, **asdict(report)}
    facts["items_per_second"] = report.encoded_now / report.seconds if report.encoded_now else None
    if verify:
        facts["verified"] = _verify(store, items, tokenizer, options)
    if as_json:
        emit_json(facts)
        return
    there = report.items - report.encoded_now
    console().print(
        f"{store}: {report.rows} items in {report.shards} shard{'s' * (report.shards != 1)}, {report.bytes:,} bytes"
        + (f"; {there} were there already" if there else "")
        + (f"; {report.quarantined} unreadable, listed in {store / 'quarantine.jsonl'}" if report.quarantined else "")
    )
    if verify:
        checked = facts["verified"]
        console().print(f"verified: {checked['items']} items encoded again, {checked['share_differing']:.4%} differ")


def _is_ray(engine: str, address: str | None) -> bool:
    from vistok.errors import InputError

    if engine not in ("local", "ray"):
        raise InputError(f"--engine {engine}; expected local or ray")
    if address and engine != "ray":
        raise InputError("--address is a Ray cluster's; give it with --engine ray")
    return engine == "ray"


def _verify(store: Path, source: "Source", tokenizer: "Tokenizer", options: "EncodeOptions") -> dict[str, Any]:
    from vistok.errors import MismatchError
    from vistok.scale.verify import verify_store

    found = verify_store(store, source, tokenizer, options)
    if found.wrong:
        raise MismatchError(
            f"{len(found.wrong)} of {found.items} items encoded again do not match {store}; the first: {found.wrong[0]}"
        )
    return asdict(found)


class bar:
    """A progress bar on stderr, where stderr is a terminal; `advance(done, bad)` moves it."""

    def __init__(self, title: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._title, self._total = title, total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]} {task.fields[bad]}"),
            TimeRemainingColumn(),
            console=console(),
            transient=True,
            disable=not console().is_terminal,
        )

    def __enter__(self) -> Any:
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._total, speed="", bad="")
        return self._advance

    def _advance(self, done: int, bad: int = 0) -> None:
        speed = self._progress.tasks[0].finished_speed or self._progress.tasks[0].speed
        self._progress.update(
            self._task,
            completed=done,
            speed=f"{speed:.0f}/s" if speed else "",
            bad=f"[red]{bad} unreadable[/red]" if bad else "",
        )

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()
