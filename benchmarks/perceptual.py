"""What the perceptual term without a download is worth: small autoencoders trained with and without it.

    python benchmarks/perceptual.py [--data FOLDER] [--steps 600] [--seeds 2] [--arms l2 steerable ..]

CIFAR-10, 256 numbers a picture (4 x 4 x 16), continuous, batch 32; all arms alike but for the loss. Measured on 1000
test pictures: PSNR; sharpness, the mean gradient of the reconstructions over that of the originals; fine, the same of
the power above half of the highest frequency; accuracy of a classifier trained on originals, and how often it says of
the reconstruction what it says of the original. Writes benchmarks/results/perceptual.json.
"""

import argparse
import json
import platform
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.data.sources import open_source
from vistok.losses.perceptual import build_perceptual
from vistok.metrics.psnr import psnr
from vistok.reproductions._small import SmallDecoder, SmallEncoder, batches, fit
from vistok.training.validation import read_crops

RESULT = Path(__file__).parent / "results" / "perceptual.json"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WIDTHS = (16, 32, 48)
ARMS: dict[str, tuple[float, dict[str, Any]]] = {  # weight of the term, its options
    "l2": (0.0, {}),
    "steerable": (0.02, {}),
    "steerable-strong": (0.1, {}),
    "structure-only": (0.02, {"texture": 0.0}),
}


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    train = read_crops(open_source(given.data / "cifar10" / "train.parquet"), 32, 20_000)
    test = read_crops(open_source(given.data / "cifar10" / "test.parquet"), 32, 1000)
    judge = classifier(*train)
    originals = test[0].float() / 255
    accuracy = float((judge(originals).argmax(1) == test[1]).float().mean())
    print(f"originals: accuracy {accuracy:.3f}", flush=True)
    arms: dict[str, list[dict[str, float]]] = {}
    for seed in range(given.seeds):
        for arm in given.arms:
            found = measure(rebuilt(arm, seed, given.steps, train, originals), originals, test[1], judge)
            arms.setdefault(arm, []).append(found)
            print(
                f"{arm}, seed {seed}: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True
            )
    facts = {"steps": given.steps, "originals": {"accuracy": accuracy}, "machine": platform.processor() or "cpu"}
    if RESULT.exists():  # other arms of the same experiment stay
        before = json.loads(RESULT.read_text())
        if all(before.get(name) == value for name, value in facts.items()):
            arms = before["arms"] | arms
    RESULT.write_text(json.dumps({**facts, "arms": arms}, indent=1) + "\n")


def rebuilt(arm: str, seed: int, steps: int, train: tuple[Tensor, Tensor], originals: Tensor) -> Tensor:
    """Reconstructions of `originals` by an autoencoder trained with the loss of `arm`."""
    weight, options = ARMS[arm]
    term: Callable[[Tensor, Tensor], Tensor] = build_perceptual("steerable", **options)
    torch.manual_seed(seed)
    net = nn.Sequential(SmallEncoder(WIDTHS, 16), SmallDecoder(WIDTHS, 16))

    def loss(batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        image = net(batch["pixels"])
        terms = {"reconstruction": (image - batch["pixels"]).square().mean()}
        if weight:
            terms["perceptual"] = weight * term(image, batch["pixels"]).mean()
        return terms

    fit(net, loss, batches(*train, 32, seed), steps, seed=seed)
    with torch.no_grad():
        return torch.cat([net(part) for part in originals.split(200)]).clamp(0, 1)


def measure(images: Tensor, originals: Tensor, labels: Tensor, judge: nn.Module) -> dict[str, float]:
    """See the module's docstring."""
    said, wanted = judge(images).argmax(1), judge(originals).argmax(1)
    return {
        "psnr": float(psnr(images, originals).mean()),
        "sharpness": float(gradient(images) / gradient(originals)),
        "fine": float(fine_power(images) / fine_power(originals)),
        "accuracy": float((said == labels).float().mean()),
        "agreement": float((said == wanted).float().mean()),
    }


def gradient(pixels: Tensor) -> Tensor:
    """Mean length of the gradient."""
    return (pixels.diff(dim=2)[..., :-1].square() + pixels.diff(dim=3)[..., :-1, :].square()).sqrt().mean()


def fine_power(pixels: Tensor) -> Tensor:
    """Power above half of the highest frequency, of windowed pictures without their mean."""
    side = pixels.shape[-1]
    window = torch.hann_window(side, periodic=False)
    centred = (pixels - pixels.mean((2, 3), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(centred).abs().square()
    frequency = torch.fft.fftfreq(side)
    return power[..., (frequency[:, None].square() + frequency.square()).sqrt() > 0.25].mean()


def classifier(pixels: Tensor, labels: Tensor, steps: int = 800) -> nn.Module:
    """A small CNN that tells the ten classes, trained on originals."""
    torch.manual_seed(0)
    widths, parts = (3, 16, 32, 64), []
    for entering, width in pairwise(widths):
        conv = nn.Conv2d(entering, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        parts += [conv[0], nn.BatchNorm2d(width), nn.ReLU(), conv[1], nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))

    def loss(batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"class": F.cross_entropy(net(batch["pixels"]), batch["label"])}

    fit(net, loss, batches(pixels, labels, 64, 0), steps, lr=2e-3)
    return net.requires_grad_(False)


if __name__ == "__main__":
    main()
