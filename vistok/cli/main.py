"""`vistok`: the table of commands, how they are found, and how their errors look.

A command `name` is a file `vistok/cli/<name>.py` with one function `command`, whose typer annotations are its options
and whose docstring is its help. It is imported when that command runs, so that `vistok --help` needs neither torch nor
any other command. Heavy imports belong inside the function.

Every error is one line on stderr and exit code 1; `--debug`, before or after the command, shows the traceback.
"""

import logging
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# name: (module, its line in `vistok --help`), in the order in which the help shows them
COMMANDS: dict[str, tuple[str, str]] = {
    "list": ("vistok.cli.list", "Models that load by name, with their sizes and licences."),
    "info": ("vistok.cli.info", "One model: its layout, sizes, prefixes, bits and weights."),
    "systems": ("vistok.cli.systems", "Every published system, and what of it is here."),
    "reconstruct": ("vistok.cli.reconstruct", "Pictures to tokens and back, with bits and PSNR."),
    "generate": ("vistok.cli.generate", "Pictures of classes or prompts, with their tokens or as a grid."),
    "encode": ("vistok.cli.encode", "A data set of pictures to a token store; resumable."),
    "decode": ("vistok.cli.decode", "A token store to pictures."),
    "compress": ("vistok.cli.compress", "A picture to a small compressed file."),
    "decompress": ("vistok.cli.decompress", "A compressed file to a picture."),
    "train": ("vistok.cli.train", "Train a model from a recipe; resumable."),
    "reproduce": ("vistok.cli.reproduce", "A paper's claim at small scale, against its baseline."),
    "doctor": ("vistok.cli.doctor", "What is wrong with a run, and which recipe key mends it."),
    "eval": ("vistok.cli.eval", "Measure a tokenizer on pictures: PSNR, SSIM, codebook usage, speed."),
    "compare": ("vistok.cli.compare", "Tokenizers and codecs side by side on your pictures, as a page."),
    "bench": ("vistok.cli.bench", "The field's benchmarks of tokenizers."),
    "app": ("vistok.cli.app", "A page on this machine to look at tokenizers with."),
    "explain": ("vistok.cli.explain", "Why the numbers of two results differ, term by term."),
    "convert": ("vistok.cli.convert", "The authors' checkpoint to a model folder."),
}


class Commands(TyperGroup):
    """The group of all commands: help reads the table above, only running one imports it."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        """A stand-in with the name and the help line."""
        return TyperCommand(name, help=COMMANDS[name][1]) if name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command that `args` begins with."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from vistok.errors import nearest

            ctx.fail(f"no command {args[0]!r}{nearest(args[0], list(COMMANDS))}")
        name, found, rest = super().resolve_command(ctx, args)
        return name, _import_command(args[0]) if found else found, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command. An interrupt leaves as Interrupted: typer would turn it into a silent exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


class Interrupted(Exception):
    """Ctrl-C reached a command that has no use of its own for it."""


def _import_command(name: str) -> Any:
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command(name)(import_module(COMMANDS[name][0]).command)
    return typer.main.get_command(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        import vistok

        print(f"vistok {vistok.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the library's log on stderr.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Visual tokenizers: pictures to tokens and back, and what is built on tokens."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line on `arguments` (default: those of the process) and exit with its code: 0, or 1 on error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = words[: words.index("--")] if "--" in words else words
    debug, verbose = "--debug" in own, "--verbose" in own
    words = [word for word in own if word not in ("--debug", "--verbose")] + words[len(own) :]
    words = words or ["--help"]
    log, handler = logging.getLogger("vistok"), logging.StreamHandler()
    handler.setFormatter(_LogLine())
    log.addHandler(handler)
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        code = app(args=words, prog_name="vistok", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `vistok list | head`: whoever read us has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug:
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        code = 1
    finally:
        log.removeHandler(handler)
    sys.exit(code if isinstance(code, int) else 0)


class _LogLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(super().format(record).split())
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def describe(error: BaseException) -> str:
    """An error as one line for a user; one that nobody foresaw says so, and how to see where it came from."""
    from vistok.errors import VistokError

    if isinstance(error, Interrupted):
        return "interrupted"
    if hasattr(error, "format_message"):  # typer's usage errors; their class has moved between its versions
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "vistok"
        text = f"{error.format_message().rstrip('.?')} (see `{path} --help`)"
    elif isinstance(error, VistokError):
        text = str(error)
    elif isinstance(error, OSError):
        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        text = f"{where}: {error.strerror or error}" if where else str(error.strerror or error)
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        told = f"{type(error).__name__}: {error}"
        text = f"this should not have happened: {told} (--debug shows where; please report it)"
    return " ".join(text.split())
