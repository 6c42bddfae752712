"""`vistok bench`: the field's benchmarks of tokenizers, each as one command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json, output

if TYPE_CHECKING:
    from vistok.evaluation.language import Language
    from vistok.evaluation.tokbench import TokBench

BENCHMARKS = ("tokbench", "vtbench", "language", "speed")


def command(
    name: Annotated[str, typer.Argument(help="tokbench, vtbench, language or speed.")],
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="Name or folder, several if repeated; default: ours.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="The benchmark's folder, or photographs; default: a sample made here.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the centre crop. Default: the model's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures.")] = None,
    setting: Annotated[
        str, typer.Option(help="TokBench: pixels at which pictures are rebuilt, 256, 512 or 1024.")
    ] = "256",
    reader: Annotated[str, typer.Option(help="Reads words: rapidocr, or package.module:function.")] = "rapidocr",
    faces: Annotated[str | None, typer.Option(help="TokBench: embeds faces, package.module:function.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="speed: with torch.compile too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Run a benchmark on tokenizers.

    tokbench: how much of text and faces survives, by size (arXiv:2505.18142). vtbench: reconstruction, detail and text
    preservation (arXiv:2505.13439). language: Zipf, Heaps, entropy, compression and order of the codes, beside English
    and beside controls (arXiv:2411.05001). speed: images, megapixels and tokens a second, and memory, by batch and
    precision, on random pictures.

    --data takes the published folders (docs/metrics.md), or photographs, on which words are then written. Without it
    tokbench and vtbench take photographs that come with scikit-image.
    """
    from vistok.errors import UnknownNameError, nearest

    if name not in BENCHMARKS:
        known = nearest(name, BENCHMARKS) or "; there are " + ", ".join(BENCHMARKS)
        raise UnknownNameError(f"no benchmark {name!r}{known}")
    models: list[Any] = list(model or [None])  # type: ignore[list-item]
    if name == "language":
        languages = _language(models, data, size, limit)
        if as_json:
            emit_json({"benchmark": name, "languages": [one.plain() for one in languages]})
        else:
            _show_languages(languages)
    elif name == "tokbench":
        scores = _tokbench(models, data, setting, limit, reader, faces)
        if as_json:
            emit_json({"benchmark": name, "results": [one.plain() for one in scores]})
        else:
            _show_tokbench(scores)
    elif name == "speed":
        _speed(models, size, compiled, as_json)
    else:
        found = _vtbench(models, data, limit, reader)
        if as_json:
            emit_json({"benchmark": name, "results": found})
        else:
            _show_vtbench(found)


# -- tokbench ----------------------------------------------------------------------------------------------------------


def _tokbench(
    models: list[Any], data: str | None, setting: str, limit: int | None, reader: str, faces: str | None
) -> "list[TokBench]":
    import tempfile

    from vistok.cli.encode import bar
    from vistok.cli.loading import load_tokenizer
    from vistok.evaluation.readers import build_reader, load
    from vistok.evaluation.tokbench import scenes, tokbench

    reads, embeds = build_reader(reader), load(faces) if faces else None
    with tempfile.TemporaryDirectory() as made:
        folder = Path(data) if data and (Path(data) / "annotations").is_dir() else _written(Path(made), data, limit)
        where = scenes(folder)[:limit]
        found = []
        for model in models:
            tokenizer = load_tokenizer(model)
            with bar(f"tokbench {tokenizer.name}", len(where)) as advance:
                found.append(
                    tokbench(tokenizer, where, setting, reads, faces=embeds, progress=lambda done, _: advance(done, 0))
                )
    return found


def _written(folder: Path, data: str | None, limit: int | None) -> Path:
    """TokBench's layout on photographs of the user's, or on those that come with scikit-image."""
    from vistok.data.rendered_text import write_text_bench

    write_text_bench(folder, _photographs(data, limit))
    return folder


def _photographs(data: str | None, limit: int | None) -> Any:
    from PIL import Image

    from vistok.data.samples import photographs
    from vistok.data.sources import open_source
    from vistok.errors import VistokError
    from vistok.evaluation.protocols import evaluation_crop

    if data is None:
        yield from photographs(limit or 24)
        return
    source = open_source(data)
    for item in source if limit is None else source.first(limit):
        try:
            yield Image.fromarray(evaluation_crop(item.image, 256))
        except VistokError as error:
            console().print(f"left out: {error}", markup=False)


def _show_tokbench(found: "list[TokBench]") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "score", "small", "medium", "large", "mean", "n", "PSNR dB"):
        table.add_column(column, justify="left" if column in ("", "score") else "right")
    for one in found:
        for name, binned in (one.text | one.faces).items():
            cells = [f"{100 * value:.2f}%" for value in (*binned.bins, binned.mean)]
            table.add_row(one.model, name.upper(), *cells, "/".join(map(str, binned.counts)), f"{one.psnr:.2f}")
    output().print(table)
    first = found[0]
    told = (
        f"{first.pictures} pictures at {first.setting} pixels; {first.words} of {first.annotated} words are read right"
    )
    output().print(f"{told} on the originals and count", soft_wrap=True)


# -- speed -----------------------------------------------------------------------------------------------------------


def _speed(models: list[Any], size: int | None, compiled: bool, as_json: bool) -> None:
    from rich.table import Table

    from vistok.cli.loading import load_tokenizer
    from vistok.evaluation.speed import board, speed

    rows = []
    for model in models:
        tokenizer = load_tokenizer(model)
        with console().status(tokenizer.name) as status:
            rows += speed(
                tokenizer,
                size=size,
                compiled=(False, True) if compiled else (False,),
                progress=lambda told, name=tokenizer.name: status.update(f"{name}: {told}"),  # type: ignore[misc]
            )
    if as_json:
        emit_json({"benchmark": "speed", **board(rows)})
        return
    table = Table(box=None, pad_edge=False)
    columns = ("batch", "size", "dtype", "encode images/s", "decode images/s", "Mpx/s", "tokens/s", "peak MB")
    for column in ("", *columns):
        table.add_column(column, justify="left" if column in ("", "dtype") else "right")
    for row in rows:
        both = 1 / (1 / row.encode_megapixels + 1 / row.decode_megapixels)
        table.add_row(
            row.model + (", compiled" if row.compiled else ""),
            str(row.batch),
            str(row.size),
            row.dtype,
            f"{row.encode_images:.3g}",
            f"{row.decode_images:.3g}",
            f"{both:.3g}",
            f"{row.encode_tokens:.3g}",
            "-" if row.memory_mb is None else f"{row.memory_mb:.0f}",
        )
    output().print(table)
    for row in rows:
        for doubt in row.doubts:
            console().print(f"doubtful: {row.model}, {row.dtype}: {doubt}", markup=False)


# -- vtbench -----------------------------------------------------------------------------------------------------------


def _vtbench(models: list[Any], data: str | None, limit: int | None, reader: str) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from vistok.cli.encode import bar
    from vistok.cli.loading import load_tokenizer
    from vistok.evaluation.readers import load, rapidocr_pages
    from vistok.evaluation.vtbench import TASKS, run_task

    pages = rapidocr_pages() if reader == "rapidocr" else load(reader)
    found = []
    for model in models:
        tokenizer = load_tokenizer(model)
        for task, pictures in _vtbench_tasks(data, limit).items():
            with bar(f"{task}, {tokenizer.name}", len(pictures)) as advance:
                result = run_task(
                    tokenizer,
                    task,
                    pictures,
                    page_reader=pages if TASKS[task] == "text" else None,
                    progress=lambda done: advance(done, 0),
                )
            found.append({"model": tokenizer.name, "weights": tokenizer.fingerprint, **asdict(result)})
    return found


def _vtbench_tasks(data: str | None, limit: int | None) -> dict[str, list[Any]]:
    """Task -> pictures, each with its text where it is known."""
    from vistok.data.images import read_image
    from vistok.data.rendered_text import render
    from vistok.data.samples import patterns
    from vistok.evaluation.vtbench import TASKS, tasks

    if data is not None and any((Path(data) / task).is_dir() for task in TASKS):
        return {task: [(read_image(path), None) for path in paths[:limit]] for task, paths in tasks(Path(data)).items()}
    import numpy as np

    photographs = list(_photographs(data, limit))
    written = []
    for number, photograph in enumerate(photographs):
        image, words = render(photograph, 6, np.random.default_rng([1, number]))
        written.append((image, "\n".join(word["rec"] for word in sorted(words, key=lambda word: word["bbox"][1]))))
    return {
        "task1-imagenet": [(photograph, None) for photograph in photographs],
        "task2-detail-preservation": [(pattern, None) for pattern in patterns(len(photographs))],
        "task3-movie-posters": written,
    }


def _show_vtbench(found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    names = ("psnr", "ssim", "vtbench_psnr", "vtbench_ssim", "cer", "wer", "vtbench_wer", "cer_true", "cer_floor")
    for column in ("", "task", "n", *names):
        table.add_column(column, justify="left" if column in ("", "task") else "right")
    for one in found:
        values = [f"{one['values'][name]:.3f}" if name in one["values"] else "-" for name in names]
        table.add_row(one["model"], one["task"], str(one["pictures"]), *values)
    output().print(table)


# -- language ----------------------------------------------------------------------------------------------------------


def _language(models: list[Any], data: str | None, size: int | None, limit: int | None) -> "list[Language]":
    from vistok.cli.loading import load_tokenizer
    from vistok.errors import InputError
    from vistok.evaluation.language import controls, describe, picture_corpora, python_words, text_corpus

    if data is None:
        raise InputError("bench language counts the codes of pictures: name them with --data")
    words, found = python_words(), []
    for model in models:
        tokenizer = load_tokenizer(model)
        with console().status(f"{tokenizer.name}: encoding"):
            corpora = picture_corpora(tokenizer, data, size=size, limit=limit)
        for corpus in corpora:
            length = len(corpus.sentences[0])
            if length < 2:
                console().print(f"{corpus.name} has one token a picture, which is no sentence; left out", markup=False)
                continue
            found.append(describe(corpus))
            if corpus.grid is not None and corpus.grid[0] > 1:
                found.append(describe(corpus.read("column")))
            tokens = min(corpus.tokens, len(words) // length * length)
            found.append(describe(text_corpus(words, tokens, length, corpus.size, f"English, {tokens:,} tokens")))
            found += [describe(control) for control in controls(corpus)]
    if not found:
        raise InputError("no segment of these tokenizers has more than one token a picture")
    return found


def _show_languages(found: "list[Language]") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = ("types", "of", "Zipf 1", "Zipf 2", "Benford", "bits", "of log2", "Huffman", "Heaps", "to 90 %", "order")
    for column in ("corpus", *columns):
        table.add_column(column, justify="left" if column == "corpus" else "right")
    for one in found:
        table.add_row(
            one.name,
            f"{one.types:,}",
            f"{one.size:,}",
            f"{one.frequency[0].exponent:.2f}",
            f"{one.frequency[1].exponent:.2f}",
            f"{one.digits:.3f}",
            f"{one.bits:.2f}",
            f"{one.share:.3f}",
            f"{one.code.huffman:+.1%}",
            f"{one.growth.exponent:.2f}",
            f"{one.growth.to90:.0f}",
            f"{one.order:.2f}",
        )
    output().print(table)
    told = (
        "Zipf n: exponent of n-grams over the most frequent 300; Benford: divergence of first digits; of log2: entropy "
        "as a share of log2 of the codebook; Huffman: bits saved; Heaps: exponent; to 90 %: pictures until 90 % of the "
        "types have occurred; order: held-out bigram perplexity over that of single tokens"
    )
    output().print(told, soft_wrap=True)
