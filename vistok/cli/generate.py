"""`vistok generate`: classes or prompts to pictures, as one grid or as a file for each with its tokens beside it."""

import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json, refuse_existing
from vistok.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from vistok.generator import Generator

GRID_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def command(
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", "-c", help="A class by name or number; several, with commas or -c, take turns."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A text, for models that read one; several take turns.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many pictures in all.")] = 16,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A picture for a grid, or a folder for a file each.")
    ] = Path("generated.png"),
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="A generator: name, folder or run. Default: the one that ships."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="The tokenizer that decodes, where it is not beside the model.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i is drawn from seed + i, whatever the batch.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="How much of the condition; 1 is no guidance.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest codes.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many codes; 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among codes of this probability together.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of models that generate in steps.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE: an option that the model has of its own.")
    ] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Of the grid.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: a GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a grid or files that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Generate pictures of classes or prompts.

    `-o grid.png` writes one picture, `-o FOLDER` a PNG (an MP4 of clips) for each and its tokens as .vtok, which
    `Tokens.load` reads. What is not given is as the model's authors, or its training here, have it.
    """
    if classes and prompt:
        raise InputError("give either --class or --prompt: no model here reads both")
    as_grid = output.suffix.lower() in GRID_SUFFIXES
    if columns is not None and not as_grid:
        raise InputError(f"--columns shapes a grid; {output} is a folder of single pictures")
    refuse_existing(output, overwrite)
    sampling = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = {name: value for name, value in sampling.items() if value is not None}
    settings |= own_options(option or []) | ({} if steps is None else {"steps": steps})

    from vistok.cli.loading import best_device
    from vistok.pairing import load_generator

    generator = load_generator(model, tokenizer=tokenizer, device=device or best_device())
    conditions = asked(generator, classes or [], prompt or [], count)
    if prompt:
        give_text_encoder(generator)
    began = time.perf_counter()
    images = _generate(generator, conditions, count, seed, settings, batch_size, output, as_grid, columns)
    seconds = time.perf_counter() - began
    if as_json:
        emit_json(
            {
                "model": generator.name,
                "tokenizer": generator.tokenizer.name,  # type: ignore[union-attr]
                "output": output,
                "count": count,
                "settings": settings,
                "seconds": seconds,
                "seconds_per_image": seconds / count,
                "images": images,
            }
        )
    else:
        console().print(f"{output}: {count} pictures by {generator.name}, {seconds / count:.3g} s each", markup=False)


def _generate(
    generator: "Generator",
    conditions: list[Any],
    count: int,
    seed: int,
    settings: dict[str, Any],
    batch_size: int,
    output: Path,
    as_grid: bool,
    columns: int | None,
) -> list[dict[str, Any]]:
    """Write the pictures, a batch at a time; one entry for each."""
    import torch

    from vistok.cli.encode import bar
    from vistok.data.images import write_image
    from vistok.pixels import tiled

    tokenizer = generator.tokenizer
    assert tokenizer is not None
    wants_text = "text" in tokenizer.spec.needs.decode
    images: list[dict[str, Any]] = []
    parts: list[Tensor] = []
    with bar("generate", count) if count > batch_size else nullcontext(lambda done: None) as advance:
        for first in range(0, count, batch_size):
            chosen = conditions[first : first + batch_size]
            condition = None if all(one is None for one in chosen) else chosen
            tokens = generator.generate(condition, count=len(chosen), seed=seed + first, **settings)
            told = {"text": chosen} if wants_text else {}
            pixels = tokenizer.decode(tokens, seed=seed + first, dtype=torch.uint8, **told).cpu()
            if as_grid and pixels.ndim != 4:
                raise InputError(f"{generator.name} makes clips, which no grid shows: give -o a folder")
            for row, one in enumerate(chosen):
                index = first + row
                name = _told(generator, one)
                entry: dict[str, Any] = {"seed": seed + index, "condition": name}
                if not as_grid:
                    entry |= write_one(output / file_stem(index, count, name), pixels[row], tokens[row])
                images.append(entry)
            parts += [pixels] if as_grid else []
            advance(first + len(chosen))
    if as_grid:
        shown = torch.cat(parts)
        write_image(output, tiled(shown, columns or grid_columns(count, len(set(map(str, conditions))))))
    return images


def asked(generator: "Generator", classes: Sequence[str], prompts: Sequence[str], count: int) -> list[Any]:
    """The condition of each of `count` pictures: what was asked for in turn; else all classes in turn, or None.

    Raises InputError for a class that the model does not know (the nearest are named), or the other kind of condition.
    """
    reads_text = takes_text(generator)
    if prompts and generator.classes is not None:
        raise InputError(f"{generator.name} takes classes, not prompts: --class")
    if classes and generator.classes is None:
        raise InputError(f"{generator.name} takes no classes" + (": --prompt" if reads_text else ""))
    listed: list[Any] = list(prompts)
    for word in classes:
        listed += [class_of(generator, part) for part in ([word] if word in generator.class_names else word.split(","))]
    if len(listed) > count:
        raise InputError(f"{len(listed)} conditions for {count} pictures: raise -n")
    if not listed and reads_text:
        raise InputError(f"{generator.name} reads a text: --prompt")
    listed = listed or list(range(generator.classes or 0)) or [None]
    return [listed[index % len(listed)] for index in range(count)]


def class_of(generator: "Generator", word: str) -> int:
    """The number of a class given as a word: its number, or its name, in any letter case."""
    word = word.strip()
    if word.isdecimal() and word not in generator.class_names:
        return generator.class_number(int(word))
    known = {name.casefold(): name for name in generator.class_names}
    return generator.class_number(known.get(word.casefold(), word))


def takes_text(generator: "Generator") -> bool:
    """Whether a model without classes reads a text."""
    return generator.classes is None and getattr(generator.config, "text", None) is not None


def give_text_encoder(generator: "Generator") -> None:
    """LlamaGen is handed what reads its text: the published T5, unless something was. Others have their own."""
    if generator.system == "llamagen":
        from vistok.nn.t5_text import T5Text

        config: Any = generator.config
        generator.attach_text(T5Text(length=config.text[0], device=generator.device))


def own_options(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE words as keyword arguments; values as YAML has them. Raises InputError for another form."""
    import yaml

    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.strip().isidentifier():
            raise InputError(f"--option {word!r}; expected NAME=VALUE")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--option {word!r}: the value is not one of YAML's") from error
    return found


def write_one(stem: Path, pixels: "Tensor", tokens: Any) -> dict[str, Any]:
    """One picture or clip and its tokens, each at once or not at all; the entry of its files."""
    from vistok.data.images import write_image
    from vistok.data.video import write_clip
    from vistok.errors import OutputError

    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {stem.parent}: {error.strerror or error}") from error
    beside = stem.with_name(stem.name + ".vtok")
    tokens.save(beside)
    image = stem.with_name(stem.name + (".png" if pixels.ndim == 3 else ".mp4"))
    if pixels.ndim == 3:
        write_image(image, pixels)
    else:
        write_clip(image, [pixels[None]], rate=None)
    return {"output": str(image), "tokens": str(beside), "count": int(tokens.lengths[0])}


def file_stem(index: int, count: int, condition: str | None) -> str:
    """`07-golden-retriever`: the number, and what the picture should show."""
    words = re.sub(r"[^\w]+", "-", condition or "").strip("-").lower()[:40].strip("-")
    return f"{index:0{len(str(count - 1))}d}" + (f"-{words}" if words else "")


def grid_columns(count: int, kinds: int) -> int:
    """Near a square; a column for each condition where that fills the rows."""
    if 1 < kinds < count and count % kinds == 0:
        return kinds
    return ceil(sqrt(count))


def _told(generator: "Generator", condition: Any) -> str | None:
    if isinstance(condition, int) and generator.class_names:
        return generator.class_names[condition]
    return None if condition is None else str(condition)
