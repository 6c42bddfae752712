"""`vistok bench`: the field's benchmarks of tokenizers, each as one command."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json, output

if TYPE_CHECKING:
    from vistok.evaluation.language import Language

BENCHMARKS = {"language": "statistics of the codes as of a natural language (arXiv:2411.05001)"}


def command(
    name: Annotated[str, typer.Argument(help="language.")],
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="Name or folder, several if repeated; default: ours.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Pictures: a folder, parquet, shards, a datasets id.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the centre crop. Default: the model's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Run a benchmark on tokenizers.

    language: Zipf, Benford, Heaps, entropy, Huffman and bigrams of the codes, beside English of as many tokens (the
    manual that comes with Python) and beside controls.
    """
    from vistok.errors import UnknownNameError, nearest

    if name not in BENCHMARKS:
        known = nearest(name, list(BENCHMARKS)) or "; there are " + ", ".join(BENCHMARKS)
        raise UnknownNameError(f"no benchmark {name!r}{known}")
    found = _language(model or [None], data, size, limit)
    if as_json:
        emit_json({"benchmark": name, "languages": [one.plain() for one in found]})
        return
    _show(found)


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


def _show(found: "list[Language]") -> None:
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
