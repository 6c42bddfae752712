"""Three kinds of generators on CIFAR-10, end to end, at equal budget: one code after another, masked, scale by scale.

    python benchmarks/generation.py --data DATA -o RUN [--minutes 5] [--only llamagen ..]    DATA/cifar10/*.parquet
    python benchmarks/generation.py -o RUN --report      # the result file, pictures, docs/generation.md

    pictures -> VQ-VAE, 64 codes of 512 -> llamagen, maskgit      the same net with VAR's scales, 85 codes -> var

Each generator has about 1.4 million parameters and trains for the same processor time. Guidance is chosen on training
pictures; what is reported is measured once, against the test pictures, by a small classifier of our own
(`vistok.reproductions._generation`). Killed at any moment, the same command goes on with the next part.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vistok
from vistok.data.images import write_image
from vistok.data.sources import open_source
from vistok.environment import environment
from vistok.files import write_atomically
from vistok.generator import Generator
from vistok.metrics.frechet import frechet_distance
from vistok.metrics.psnr import psnr
from vistok.pairing import load_generator, save_pair
from vistok.pixels import tiled
from vistok.reproductions._generation import (
    ITEMS,
    SIDE,
    TEST_ITEMS,
    Judge,
    drawn,
    judged_samples,
    judgements,
    shared_judge,
    small_tokenizer,
    token_batches,
    training_codes,
)
from vistok.reproductions._small import batches, fit, shared
from vistok.tokenizer import Tokenizer
from vistok.training.validation import read_crops

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE, PICTURES = (
    ROOT / "benchmarks/results/generation.json",
    ROOT / "docs/generation.md",
    ROOT / "docs/pictures",
)
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCH, TOKENIZER_STEPS, SCALES_STEPS, JUDGE_STEPS = 64, 2000, 600, 900
CRITIC_STEPS, SHARPEN_STEPS, PERCEPTUAL = 500, 500, 0.05
GUIDANCES = (1.0, 2.0, 3.0, 4.5)
TRIED, SAMPLES, SHOWN = 200, 1000, 8
WANTED = 0.9  # of what the classifier scores on real pictures

GENERATORS: dict[str, tuple[str, str, float, dict[str, Any]]] = {
    # name: (what it is, variant, learning rate, what is drawn with beside guidance)
    "llamagen": ("one code after another", "llamagen-cifar10", 2e-3, {}),
    "maskgit": ("masked, 12 steps", "maskgit-cifar10", 2e-3, {}),
    "var": ("scale by scale, 4 steps", "var-cifar10", 2e-3, {}),
}


@dataclass(frozen=True)
class Run:
    """What `vistok.reproductions._generation` asks of a reproduction's context: a folder, pictures, a voice."""

    root: Path
    data: Path | None
    batch: int = BATCH

    @property
    def folder(self) -> Path:
        """Two floors below the folder that is shared."""
        return self.root / "seed-0" / "generation"

    def train_pixels(self, size: int, limit: int) -> tuple[Tensor, Tensor]:
        """The first training pictures, uint8, and their labels."""
        return self._crops("train", size, limit)

    def test_pixels(self, size: int, limit: int) -> tuple[Tensor, Tensor]:
        """The first test pictures, uint8, and their labels."""
        return self._crops("test", size, limit)

    def _crops(self, half: str, size: int, limit: int) -> tuple[Tensor, Tensor]:
        if self.data is None:
            raise SystemExit("--data names the folder that holds cifar10/train.parquet and cifar10/test.parquet")
        return read_crops(open_source(self.data / "cifar10" / f"{half}.parquet"), size, limit)

    def tell(self, text: str) -> None:
        """Say a line."""
        print(text, flush=True)

    def note(self, name: str, content: dict[str, Any]) -> None:
        """Keep a part of the result."""
        write_atomically(self.root / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())

    def noted(self, name: str) -> dict[str, Any] | None:
        """A part of the result, where it is there."""
        path = self.root / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None


# -- training ----------------------------------------------------------------------------------------------------------


class Critic:
    """What tells a blurred picture from a sharp one: a small classifier's maps, each channel vector of unit length.

    It is trained on the training pictures from another seed than the judge and is narrower; the judge itself never
    teaches.
    """

    def __init__(self, run: Any) -> None:
        def make() -> dict[str, Tensor]:
            run.tell(f"critic: {CRITIC_STEPS} steps")
            torch.manual_seed(1)
            net = Judge(widths=(24, 48, 96, 96))
            data = batches(*run.train_pixels(SIDE, ITEMS), 128, 1)
            fit(net, net.loss, data, CRITIC_STEPS, lr=4e-3, seed=1, bf16=True, tell=run.tell)
            return net.state_dict()

        self.net = Judge(widths=(24, 48, 96, 96))
        self.net.load_state_dict(shared(run, "critic", make))
        self.net.requires_grad_(False).eval()

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """PERCEPTUAL times the summed squared distance of the maps, (B,)."""
        with torch.no_grad():
            wanted = self.net.maps(target)
        parts = [
            (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean((1, 2))
            for a, b in zip(self.net.maps(image), wanted, strict=True)
        ]
        return PERCEPTUAL * torch.stack(parts).sum(0)


def grid_tokenizer(run: Any) -> Tokenizer:
    """The small VQ-VAE, its decoder sharpened by the critic; codes are those of `small_tokenizer`."""
    tokenizer: Any = small_tokenizer(run, TOKENIZER_STEPS)

    def make() -> dict[str, Tensor]:
        tokenizer.judge(None, Critic(run))
        tokenizer.decoder.requires_grad_(True)
        data = batches(*run.train_pixels(SIDE, ITEMS), BATCH, 2)
        run.tell(f"decoder: {SHARPEN_STEPS} steps")
        fit(tokenizer.decoder, tokenizer.loss, data, SHARPEN_STEPS, lr=5e-4, bf16=True, tell=run.tell)
        return tokenizer.state_dict()

    tokenizer.load_state_dict(shared(run, "tokenizer-sharpened", make))
    tokenizer.judge()
    return tokenizer.requires_grad_(False).eval()


def scale_tokenizer(run: Any) -> Tokenizer:
    """The same with VAR's scales; starts from the other's convolutions and learns with the critic."""
    torch.manual_seed(0)
    scales: Any = vistok.create("vq-vae-small-scales")

    def make() -> dict[str, Tensor]:
        ours, plain = scales.state_dict(), grid_tokenizer(run).state_dict()
        scales.load_state_dict(ours | {key: value for key, value in plain.items() if "quantizer." not in key})
        with torch.no_grad():  # rows of the latents' own size, so that all of them come into use
            scales.quantizer.codebook.normal_(std=0.3)
        scales.to(memory_format=torch.channels_last).judge(None, Critic(run))
        data = batches(*run.train_pixels(SIDE, ITEMS), BATCH, 3)
        run.tell(f"tokenizer with scales: {SCALES_STEPS} steps")
        fit(scales, scales.loss, data, SCALES_STEPS, bf16=True, tell=run.tell)
        return scales.state_dict()

    scales.load_state_dict(shared(run, "tokenizer-scales", make))
    scales.judge()
    return scales.requires_grad_(False).eval()


def tokenizer_of(run: Any, name: str) -> Tokenizer:
    """The tokenizer of a generator."""
    return scale_tokenizer(run) if name == "var" else grid_tokenizer(run)


def trained(run: Any, name: str, minutes: float) -> Generator:
    """A generator with its tokenizer, trained once for `minutes` of processor time; its curve in NAME-curve.json."""
    place = run.root / name
    if (place / "config.json").exists():
        return load_generator(place)
    _, variant, lr, _ = GENERATORS[name]
    tokenizer = tokenizer_of(run, name)
    found = training_codes(run, tokenizer, "codes-scales" if name == "var" else "codes")
    generator = fresh(variant, tokenizer)
    data = token_batches(found, BATCH, 0)
    began = time.process_time()
    fit(generator, generator.loss, data, 15, lr=1e-5, bf16=True)
    steps = int(minutes * 60 / ((time.process_time() - began) / 15))
    generator = fresh(variant, tokenizer)
    held = {key: value[:500] for key, value in found.items()}
    curve: list[list[float]] = []
    total = 0.0

    def loss(batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        nonlocal total
        terms = generator.loss(batch, step, rng)
        total += float(sum(terms.values()).detach())
        if (step + 1) % 25 == 0:
            curve.append([step + 1, round(total / 25, 4)])
            total = 0.0
        return terms

    run.tell(f"{name}: {sum(p.numel() for p in generator.parameters()) / 1e6:.2f} M parameters, {steps} steps")
    began = time.process_time()
    rest = {key: value[500:] for key, value in found.items()}
    fit(generator, loss, token_batches(rest, BATCH, 1), steps, lr=lr, bf16=True, tell=run.tell)
    spent = time.process_time() - began
    with torch.no_grad():
        batch = {"codes": held["codes"], "label": held["labels"]}
        unseen = float(sum(generator.loss(batch, steps, torch.Generator().manual_seed(0)).values()))
    run.note(f"{name}-curve", {"steps": steps, "processor_seconds": round(spent, 1), "unseen": unseen, "curve": curve})
    generator.class_names = NAMES
    save_pair(generator, place)
    return load_generator(place)


def fresh(variant: str, tokenizer: Tokenizer) -> Generator:
    """A generator with first weights, attached."""
    torch.manual_seed(0)
    return vistok.create(variant).attach(tokenizer)


# -- measuring ---------------------------------------------------------------------------------------------------------


def chosen_guidance(run: Any, name: str, generator: Generator) -> list[dict[str, float]]:
    """Frechet distance to 5000 training pictures, and accuracy, of few samples at each guidance; the best is first.

    The rule: the smallest distance among those whose accuracy is WANTED of that on the training pictures, else the
    highest accuracy.
    """
    judge = shared_judge(run, JUDGE_STEPS)

    def make() -> dict[str, Tensor]:
        pixels, labels = run.train_pixels(SIDE, 5000)
        features, classes = judgements(judge, pixels)
        return {"features": features, "accuracy": classes.eq(labels).double().mean()}

    train = shared(run, "train-features", make)
    tried = []
    for guidance in GUIDANCES:
        pixels, labels = drawn(generator, generator.tokenizer, TRIED, seed=1, guidance=guidance, **GENERATORS[name][3])
        features, classes = judgements(judge, pixels)
        accuracy = float(classes.eq(labels).double().mean())
        tried.append({"guidance": guidance, "fd": frechet_distance(features, train["features"]), "accuracy": accuracy})
        run.tell(f"  {name} {tried[-1]}")
    bar = WANTED * float(train["accuracy"])
    good = [one for one in tried if one["accuracy"] >= bar]
    best = min(good, key=lambda one: one["fd"]) if good else max(tried, key=lambda one: one["accuracy"])
    return [best, *(one for one in tried if one is not best)]


def measured(run: Any, name: str, generator: Generator) -> dict[str, Any]:
    """Everything about one generator."""
    tried = chosen_guidance(run, name, generator)
    options = {"guidance": tried[0]["guidance"], **GENERATORS[name][3]}
    began = time.process_time()
    pixels, labels = drawn(generator, generator.tokenizer, SAMPLES, seed=0, **options)
    seconds = (time.process_time() - began) / SAMPLES
    numbers = judged_samples(pixels, labels, run)
    shown = pixels[: SHOWN * 10]  # ten classes in a row
    write_image(run.root / f"{name}.png", tiled(shown, 10))
    return {
        "what": GENERATORS[name][0],
        "parameters": sum(parameter.numel() for parameter in generator.parameters()),
        "tokens": generator.spec.length,
        "options": options,
        "tried": sorted(tried, key=lambda one: one["guidance"]),
        "samples": SAMPLES,
        "seconds_per_image": seconds,
        **numbers,
        **(run.noted(f"{name}-curve") or {}),
    }


def rebuilt(run: Any, tokenizer: Tokenizer) -> dict[str, float]:
    """What a perfect generator could reach: the judge on decoded test pictures, as many as there are samples."""
    pixels, labels = run.test_pixels(SIDE, TEST_ITEMS)
    parts = [tokenizer.decode(tokenizer.encode(part), dtype=torch.uint8) for part in pixels.split(250)]
    decoded = torch.cat(parts)
    judge = shared_judge(run, JUDGE_STEPS)
    return {
        "psnr": float(psnr(decoded, pixels).mean()),
        **judged_samples(decoded[:SAMPLES], labels[:SAMPLES], run),
        "fd_of_training_pictures": frechet_distance(
            judgements(judge, run.train_pixels(SIDE, SAMPLES)[0])[0], judgements(judge, pixels)[0]
        ),
    }


def ship(run: Run, name: str, folder: Path) -> None:
    """A generator and its tokenizer in half precision, with the guidance that was chosen, for vistok/weights."""
    generator, numbers = load_generator(run.root / name), run.noted(f"{name}-numbers")
    assert numbers is not None
    guidance = numbers["options"]["guidance"]
    tokenizer: Any = generator.tokenizer
    tokenizer.name = "vq-vae-cifar10"
    tokenizer.half().save(folder / "tokenizer")
    config = replace(generator.config, tokenizer=None)
    if hasattr(config, "sampling"):
        config = replace(config, sampling=replace(config.sampling, guidance=guidance))
    else:
        config = replace(config, guidance=guidance)
    generator.config, generator.name = config, GENERATORS[name][1]
    generator.half().attach(vistok.load(folder / "tokenizer"))
    generator.save(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


# -- the page ----------------------------------------------------------------------------------------------------------


def report(run: Run, longer: Run | None) -> None:
    """The result file, the pictures and the page, from the parts that are there; `longer` ran with more minutes."""
    parts = {name: run.noted(f"{name}-numbers") for name in GENERATORS}
    found = {name: part for name, part in parts.items() if part is not None}
    tokenizers = {name: run.noted(f"{name}-tokenizer") for name in found}
    if not found:
        raise SystemExit(f"{run.root} holds no numbers yet")
    result: dict[str, Any] = {"generators": found, "tokenizers": tokenizers, "environment": environment()}
    if longer is not None:
        told = {name: longer.noted(f"{name}-numbers") for name in GENERATORS}
        result["longer"] = {name: part for name, part in told.items() if part is not None}
    write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    from PIL import Image

    for name in found:
        write_image(PICTURES / f"generated-{name}.webp", Image.open(run.root / f"{name}.png"), quality=80)
    for name in result.get("longer", {}):
        assert longer is not None
        write_image(PICTURES / f"generated-{name}-longer.webp", Image.open(longer.root / f"{name}.png"), quality=80)
    page(result)


def page(result: dict[str, Any]) -> None:
    """Put the table and the curves between the marks of docs/generation.md."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- generation -->", "<!-- /generation -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    write_atomically(PAGE, (before + begin + "\n" + "\n".join(lines(result)) + "\n" + end + after).encode())


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The page's measured part."""
    found, longer = result["generators"], result.get("longer", {})
    rows = {f"`{name}`: {part['what']}": part for name, part in found.items()}
    rows |= {f"`{name}`, trained longer": part for name, part in longer.items()}
    real = next(iter(found.values()))["real_accuracy"]
    yield f"The classifier puts {100 * real:.1f} % of the real test pictures in the right class."
    name, most = max(rows.items(), key=lambda row: row[1]["accuracy"])
    yield (
        f"The most recognised samples, those of {name}, are recognised {100 * most['accuracy'] / real:.0f} % as often; "
        f"{100 * WANTED:.0f} % was the aim."
    )
    yield ""
    yield "| | tokens | parameters | steps | minutes | guidance | right class | of real | FD | ms an image |"
    yield "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, part in rows.items():
        size, minutes = part["parameters"] / 1e6, part["processor_seconds"] / 60
        right = f"{100 * part['accuracy']:.1f} % | {100 * part['accuracy'] / real:.0f} %"
        yield (
            f"| {name} | {part['tokens']} | {size:.2f} M | {part['steps']} | {minutes:.1f} "
            f"| {part['options']['guidance']:g} | {right} | {part['fd']:.3f} | {1000 * part['seconds_per_image']:.1f} |"
        )
    for name, told in result["tokenizers"].items():
        if told is not None and name != "maskgit":
            yield (
                f"| test pictures through the tokenizer of `{name}` | {found[name]['tokens']} | | | | "
                f"| {100 * told['accuracy']:.1f} % | {100 * told['accuracy'] / real:.0f} % | {told['fd']:.3f} | |"
            )
    floor = next((told["fd_of_training_pictures"] for told in result["tokenizers"].values() if told), None)
    if floor is not None:
        yield f"| training pictures, the floor of this distance | | | | | | | | {floor:.3f} | |"
    yield ""
    yield "Guidance, chosen on training pictures (FD to those, share in the right class):"
    yield ""
    yield "| | " + " | ".join(f"{one:g}" for one in GUIDANCES) + " |"
    yield "| :--- |" + " ---: |" * len(GUIDANCES)
    for name, part in found.items():
        cells = [f"{one['fd']:.2f}, {100 * one['accuracy']:.0f} %" for one in part["tried"]]
        yield f"| `{name}` | " + " | ".join(cells) + " |"
    yield ""
    yield "Training loss in nats a token (means of 25 steps) at tenths of the way, and on 500 pictures held out:"
    yield ""
    yield "| | " + " | ".join(f"{tenth}/10" for tenth in range(1, 11)) + " | held out |"
    yield "| :--- |" + " ---: |" * 11
    for name, part in found.items():
        curve = part["curve"]
        cells = [f"{curve[max(len(curve) * tenth // 10 - 1, 0)][1]:.2f}" for tenth in range(1, 11)]
        yield f"| `{name}` | " + " | ".join(cells) + f" | {part['unseen']:.2f} |"
    for name in found:
        yield ""
        yield f"`{name}`, ten classes in columns, seeds in order, none picked:"
        yield ""
        yield f"![samples of {name}](pictures/generated-{name}.webp)"
    for name in longer:
        yield ""
        yield f"`{name}`, trained longer:"
        yield ""
        yield f"![samples of {name}, trained longer](pictures/generated-{name}-longer.webp)"


def main() -> None:
    """Train and measure what is not there yet, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that holds cifar10/")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="processor time that each generator trains")
    parser.add_argument("--only", nargs="+", choices=list(GENERATORS), default=list(GENERATORS))
    parser.add_argument("--report", action="store_true")
    parser.add_argument(
        "--longer", type=Path, help="of --report: another RUN, of more minutes, to show beside this one"
    )
    parser.add_argument("--ship", metavar="FOLDER", type=Path, help="write the generator of --only for the package")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(given.output, given.data)
    if given.report:
        report(run, None if given.longer is None else Run(given.longer, None))
        return
    if given.ship is not None:
        ship(run, given.only[0], given.ship)
        return
    for name in given.only:
        generator = trained(run, name, given.minutes)
        shared_judge(run, JUDGE_STEPS)
        if run.noted(f"{name}-numbers") is None:
            run.note(f"{name}-numbers", measured(run, name, generator))
        if name != "maskgit" and run.noted(f"{name}-tokenizer") is None:  # whose tokenizer is llamagen's
            run.note(f"{name}-tokenizer", rebuilt(run, generator.tokenizer))
        print(json.dumps({key: value for key, value in (run.noted(f"{name}-numbers") or {}).items() if key != "curve"}))


if __name__ == "__main__":
    main()
