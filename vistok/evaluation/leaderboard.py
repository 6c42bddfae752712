"""The leaderboard: every tokenizer that a `tiny` recipe trains or that ships, on the same pictures, at one budget.

    recipe --scaled to a number of pictures--> trainer --> model ---\\
    what ships, as it is -------------------------------------------+--> `evaluate` on test pictures --> NAME.json
    NAME.json of all entries, and what the catalogue says of the papers' numbers --> `page`, Markdown

    python -m vistok.evaluation.leaderboard SPEC.json     one entry, in a process of its own: what fails fails alone

The budget is pictures seen by all stages together, each stage keeping its share; processor seconds are what that took,
and a limit on them ends an entry as failed. The Frechet distance is in the features of a small classifier of CIFAR-10
trained here (`vistok.reproductions._generation`), so that it needs no download and compares with no published FID.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok import catalogue
from vistok.data.sources import open_source
from vistok.environment import environment
from vistok.errors import FormatError
from vistok.evaluation.reconstruction import evaluate
from vistok.files import write_atomically
from vistok.inventory import recipe_names
from vistok.losses.perceptual import build_perceptual
from vistok.metrics.extractors import Extractor, Way
from vistok.reproductions._generation import Judge, trained_judge
from vistok.tokenizer import Tokenizer
from vistok.training.prepare import build_model
from vistok.training.recipe import ModelSection, Recipe, check, load_recipe
from vistok.training.trainer import train
from vistok.training.validation import read_crops

VERSION = 1
JUDGE, JUDGE_STEPS, JUDGE_ITEMS = "cifar10-judge", 450, 50_000
TIMED = 64  # pictures whose encoding and decoding is timed


@dataclass(frozen=True)
class Board:
    """One table: where its halves lie below the folder of data sets, the side of its crops, and how many are tested.

    pictures  the training budget of every entry
    scale     share of a picture that a training crop shows, None for all of it
    judged    whether there are enough test pictures for a Frechet distance
    """

    name: str
    title: str
    train: str
    test: str
    size: int
    count: int
    pictures: int
    scale: tuple[float, float] | None = None
    judged: bool = True


BOARDS = {
    board.name: board
    for board in (
        Board("cifar10", "CIFAR-10", "cifar10/train.parquet", "cifar10/test.parquet", 32, 1000, 12_800),
        Board(
            "imagenet-samples",
            "Photographs of ImageNet",
            "imagenet-samples/train",
            "imagenet-samples/val",
            64,
            100,
            6400,
            scale=(0.2, 1.0),
            judged=False,
        ),
    )
}


@dataclass(frozen=True)
class Entry:
    """A row of a board: a recipe to train, or the name of a model that ships."""

    board: str
    name: str
    system: str
    recipe: str | None = None

    @property
    def key(self) -> str:
        """BOARD/NAME."""
        return f"{self.board}/{self.name}"


def entries(board: Board) -> Iterator[tuple[Entry, str]]:
    """Every entry of a board, with why it cannot be on it ("" where it can): what ships first, then `tiny` recipes."""
    for variant in catalogue.variants():
        if variant.role == "tokenizer" and any(file.package for file in variant.weights):
            yield Entry(board.name, variant.name, variant.system), ""
    for slug, found in catalogue.entries().items():
        if "tokenizer" in found.roles and "tiny" in recipe_names(slug):
            section = load_recipe(f"{slug}/tiny").resolved()[-1][1].model
            yield Entry(board.name, f"{slug}-tiny", slug, f"{slug}/tiny"), _unfit(section, board.size)


def _unfit(section: ModelSection, side: int) -> str:
    spec = build_model(section).spec
    if spec.modality != "image":
        return f"takes a {spec.modality}"
    return "" if spec.sizes.padded((side, side)) == (side, side) else f"takes no pictures of {side} pixels"


def budgeted(recipe: Recipe, board: Board, seed: int = 0) -> Recipe:
    """A recipe whose stages together see the board's pictures, on its crops: steps, warm-ups and the steps at which
    discriminators start are scaled by one factor.
    """
    stages = recipe.resolved()
    share = board.pictures / sum(held.train.steps * held.train.batch_size for _, held in stages)
    plain = recipe.plain()
    for section in (plain, *plain.get("stages", [])):
        _scale(section, "train", "steps", share, least=1)
        _scale(section, "optimizer", "warmup", share)
        for judge in ("adversary", "clip_adversary"):
            _scale(section, judge, "start", share)
    plain["data"] |= {"size": board.size, "scale": board.scale, "turn": False, "validation": 0, "crop": "random"}
    quiet = {"tensorboard": False, "sample_every": 0, "validate_every": 0, "log_every": 50, "threads": 1, "seed": seed}
    plain["train"] |= quiet
    return check(plain, recipe.model.name or "")


def _scale(plain: dict[str, Any], section: str, key: str, share: float, least: int = 0) -> None:
    if (plain.get(section) or {}).get(key):
        plain[section][key] = max(round(plain[section][key] * share), least)


# -- one entry ---------------------------------------------------------------------------------------------------------


def measure(entry: Entry, data: Path, runs: Path, lpips: list[str] | None = None) -> dict[str, Any]:
    """Train where there is a recipe, evaluate, and return what the entry's file holds. Raises what those raise.

    Killed in training, it goes on from the last checkpoint; `interrupted` then says that processor seconds are short.
    """
    board, folder = BOARDS[entry.board], runs / entry.key
    spent: dict[str, Any] = {}
    extractor = judge_extractor(data, runs) if board.judged else None
    if entry.recipe is None:
        tokenizer = vistok.load(entry.name)
    else:
        recipe = budgeted(load_recipe(entry.recipe), board)
        again, begun = folder.exists(), time.process_time()
        tokenizer = vistok.load(train(recipe, open_source(data / board.train), folder, resume=True))
        stages = [(stage.name, held.train.steps, held.train.batch_size) for stage, held in recipe.resolved()]
        spent = {
            "pictures": sum(steps * batch for _, steps, batch in stages),
            "stages": [{"name": name, "steps": steps, "batch": batch} for name, steps, batch in stages],
            "processor_seconds": round(time.process_time() - begun, 1),
            "interrupted": again,
        }
    source = open_source(data / board.test).first(board.count)
    pixels = read_crops(source, board.size, TIMED)[0]
    whole = tokenizer.encode(pixels[:1]).length
    judge = build_perceptual("lpips-vgg", lpips) if lpips else None
    found = evaluate(tokenizer, source, size=board.size, length=whole, extractor=extractor, lpips=judge)
    return {
        "version": VERSION,
        "entry": asdict(entry),
        "budget": {"pictures": board.pictures},
        "spent": spent,
        "parameters": sum(part.numel() for part in tokenizer.parameters()),
        "images_per_processor_second": speed(tokenizer, pixels),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
        "reconstruction": found.plain(),
        "environment": environment(),
    }


def speed(tokenizer: Tokenizer, pixels: Tensor, rounds: int = 3) -> float:
    """Pictures that are encoded and decoded in a second of processor time, in one batch: the best of some rounds.

    On one thread that is the time by the clock of a machine that does nothing else.
    """
    seconds = []
    for _ in range(rounds):
        begun = time.process_time()
        tokenizer.decode(tokenizer.encode(pixels))
        seconds.append(time.process_time() - begun)
    return len(pixels) / min(seconds)


def judge_extractor(data: Path, runs: Path) -> Extractor:
    """The classifier that distances are taken in, trained once on CIFAR-10 and kept in `runs`/judge.pt."""
    path = runs / "judge.pt"
    if not path.exists():
        pixels, labels = read_crops(open_source(data / BOARDS["cifar10"].train), 32, JUDGE_ITEMS)
        state = trained_judge(pixels, labels, JUDGE_STEPS, tell=lambda text: None).state_dict()
        runs.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda place: torch.save(state, place))
    judge = Judge()
    judge.load_state_dict(torch.load(path, weights_only=True))
    way = Way("torch", 32, (0.0,) * 3, (255.0,) * 3)  # pixels of 0..1
    return Extractor(JUDGE, judge, way, lambda pixels, names: {"features": judge.features(pixels)})


def main(path: str) -> int:
    """Measure what a spec file {entry, data, runs, lpips, target} says; the result or the error goes to its target."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    entry, target = Entry(**spec["entry"]), Path(spec["target"])
    try:
        found = measure(entry, Path(spec["data"]), Path(spec["runs"]), spec.get("lpips"))
    except Exception as error:  # whatever it is, it is this entry's result
        write_atomically(target, _json(failed(entry, f"{type(error).__name__}: {error}")))
        return 1
    write_atomically(target, _json(found))
    return 0


def failed(entry: Entry, error: str) -> dict[str, Any]:
    """What the file of an entry holds that gave no numbers."""
    return {"version": VERSION, "entry": asdict(entry), "error": error}


def _json(found: Mapping[str, Any]) -> bytes:
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()


# -- the page ----------------------------------------------------------------------------------------------------------

HEAD = (
    "",
    *("bits/pixel", "PSNR dB", "SSIM", "LPIPS", "FD", "usage", "parameters", "images/s"),
    *("pictures", "processor s", "the paper claims"),
)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results below a folder, by BOARD/NAME. Raises FormatError for a file of another kind or a newer version."""
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict) or "entry" not in held or held.get("version", 0) > VERSION:
            raise FormatError(f"{path} is no result of the leaderboard, or one of a newer vistok")
        found[Entry(**held["entry"]).key] = held
    return found


def page(results: Mapping[str, dict[str, Any]]) -> str:
    """The page, Markdown, of results by key."""
    parts = [_FOREWORD]
    for board in BOARDS.values():
        rows = [held for key, held in results.items() if key.startswith(f"{board.name}/")]
        if rows:
            parts.append(_board(board, rows))
    parts += ["## What the papers claim", _CLAIMS, _table(("", "system", "tokens", "parameters", "claim"), _claimed())]
    return "\n\n".join(parts) + "\n"


def _board(board: Board, rows: list[dict[str, Any]]) -> str:
    good = [held for held in rows if "error" not in held]
    bad = [held for held in rows if "error" in held]
    good.sort(key=lambda held: held["reconstruction"]["prefixes"][-1]["bits_per_pixel"])
    scaled = f"{board.scale[0]:.0%} to all" if board.scale else "all"
    told = (
        f"`{board.train}` to learn from ({board.pictures:,} pictures seen by all stages together, crops of {scaled} of "
        f"a picture), the first {board.count:,} of `{board.test}` to be tested on, crops of {board.size} pixels."
    )
    machine = next((held["environment"]["device"] for held in good), "")
    parts = [f"## {board.title}", told + (f" One thread of {machine}." if machine else "")]
    if good:
        parts.append(_table(HEAD, [_row(held) for held in good]))
    if bad:
        parts.append(
            "Without numbers: " + "; ".join(f"{held['entry']['name']} ({held['error']})" for held in bad) + "."
        )
    return "\n\n".join(parts)


def _row(held: Mapping[str, Any]) -> list[str]:
    entry, found, spent = held["entry"], held["reconstruction"], held["spent"]
    row = found["prefixes"][-1]
    used = [book["usage"] for book in found["codebooks"] if book["usage"] is not None]
    distance = row["distances"].get("fid")
    seconds = f"{spent['processor_seconds']:.0f}" + ("+" if spent.get("interrupted") else "") if spent else "ships"
    return [
        f"`{entry['recipe']}`" if entry["recipe"] else f"**`{entry['name']}`**",
        f"{row['bits_per_pixel']:.3f}",
        f"{row['psnr']:.2f}",
        f"{row['ssim']:.3f}",
        "" if row["lpips"] is None else f"{row['lpips']:.3f}",
        "" if distance is None else f"{distance:.2f}",
        f"{sum(used) / len(used):.0%}" if used else "continuous" if not found["codebooks"] else "",
        _count(held["parameters"]),
        f"{held['images_per_processor_second']:.0f}",
        f"{spent['pictures']:,}" if spent else "",
        seconds,
        best_claim(entry["system"]),
    ]


def best_claim(system: str) -> str:
    """The lowest rFID that the authors report for one of a system's tokenizers, and which one; "" where none is."""
    found = [(float(value), variant.name) for variant, value in _rfids() if variant.system == system]
    if not found:
        return ""
    value, name = min(found)
    return f"*rFID {value:g}, {name}*"


def _claimed() -> list[list[str]]:
    return [
        [
            f"`{variant.name}`",
            variant.system,
            "" if variant.tokens is None else str(variant.tokens),
            "" if variant.parameters is None else f"{variant.parameters:g} M",
            f"*rFID {value}*",
        ]
        for variant, value in _rfids()
    ]


def _rfids() -> Iterator[tuple[catalogue.Variant, str]]:
    for variant in catalogue.variants():
        found = re.search(r"rFID (?:about )?([\d.]+\d)", variant.summary)
        if found and variant.role == "tokenizer":
            yield variant, found.group(1)


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(head), [":---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_FOREWORD = """\
# Leaderboard

Every tokenizer that ships, and every one that a `tiny` recipe trains, on the same pictures, the trained ones at one
budget of pictures seen. Made by

```
python benchmarks/leaderboard.py --data DATA -o RUNS     # measures what is not there yet; results as JSON
python docs/make_leaderboard.py                          # writes this page from them
```

What to read it for: whether a system trains here, and what it costs. It does not say which method is better: tiny
recipes differ in size and bits (rows are in the order of bits), a budget of minutes favours what learns fast, one seed
was run, and what ships was trained for longer on other pictures. PSNR, SSIM and the rest are
[`vistok eval`](metrics.md)'s with its own protocol; LPIPS stands where its weights were at hand (`--lpips`). FD is the
Frechet distance in 128 features of a classifier of CIFAR-10 that is trained on the spot (`cifar10-judge`): it compares
rows of this page and nothing else. Usage is the mean over codebooks of the share of codes that the test pictures use.
Images/s are encoding and decoding in batches of 64, by processor time on one thread."""

_CLAIMS = """\
As their authors report them, on the 50,000 validation pictures of ImageNet-1k at 256 pixels, each by a protocol of its
own: claims, not measured here, and not to be compared with the tables above."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
