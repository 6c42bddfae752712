"""What reproductions of generators on CIFAR-10 share: tokens of a small tokenizer, and a judge of what is generated.

    pixels (50000, 3, 32, 32) -> VQ-VAE of f = 4 -> codes (50000, 64), each of 512          shared by arms and seeds
    generator.attach(tokenizer), fit on token_batches(..) -> drawn(..) -> judged_samples(..)

How an arm uses it:

    tokenizer = small_tokenizer(context)                     # trained once, about 4 minutes of a core
    found = training_codes(context, tokenizer)               # {"codes": (n, 64), "labels": (n,)}, kept on disk
    generator = vistok.create("llamagen-tiny", codebook_size=512).attach(tokenizer)
    fit(generator, generator.loss, token_batches(found, context.batch, seed), context.steps, seed=seed, bf16=True)
    pixels, labels = drawn(generator, tokenizer, guidance=2.0, seed=seed)
    return judged_samples(pixels, labels, context)           # {"fd": .., "accuracy": .., "real_accuracy": ..}

The judge is a small residual network trained from the labels of the training pictures, some 3 minutes of a core for
76 % of the test pictures. Its pooled features measure the Frechet distance; both are this library's own and compare
with no published FID.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vistok
from vistok.metrics.frechet import frechet_distance
from vistok.reproductions._small import batches, fit, shared
from vistok.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vistok.evaluation.reproducing import Context
    from vistok.generator import Generator

SIDE, CLASSES, ITEMS, TEST_ITEMS = 32, 10, 50_000, 10_000
CODES, GRID = 512, (8, 8)
AT_ONCE = 250


# -- the judge ---------------------------------------------------------------------------------------------------------


class Convolution(nn.Sequential):
    """3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, entering: int, width: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(entering, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )


class Judge(nn.Module):
    """Says which of ten classes a picture is of. Pixels (B, 3, 32, 32) in [0, 1] -> features (B, 128) -> logits."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        first, second, third, last = widths
        self.stem = nn.Sequential(Convolution(3, first), Convolution(first, second, 2))
        self.early = nn.Sequential(Convolution(second, second), Convolution(second, second))
        self.middle = nn.Sequential(Convolution(second, third), nn.MaxPool2d(2), Convolution(third, last))
        self.late = nn.Sequential(nn.MaxPool2d(2), Convolution(last, last), Convolution(last, last))
        self.skip = nn.MaxPool2d(2)
        self.classify = nn.Linear(last, CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        """Pooled features (B, 128), float32."""
        return self.maps(pixels)[-1].float().mean((2, 3))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps of four depths, (B, C, h, w), h from 16 to 4."""
        stem = self.stem((pixels * 4 - 2).contiguous(memory_format=torch.channels_last))
        early = stem + self.early(stem)
        middle = self.middle(early)
        return [stem, early, middle, self.skip(middle) + self.late(middle)]

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.classify(self.features(pixels))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy with smoothed labels, of pictures that are moved by up to 4 pixels."""
        pixels = F.pad(batch["pixels"], (4, 4, 4, 4), mode="reflect")
        down, across = (int(torch.randint(9, (), generator=rng)) for _ in range(2))
        logits = self(pixels[:, :, down : down + SIDE, across : across + SIDE])
        return {"cross_entropy": F.cross_entropy(logits, batch["label"], label_smoothing=0.1)}


def trained_judge(pixels: Tensor, labels: Tensor, steps: int, *, batch: int = 128, seed: int = 0, tell: Any) -> Judge:
    """A judge of uint8 pixels (n, 3, 32, 32) and their labels (n,), frozen."""
    torch.manual_seed(seed)
    judge = Judge()
    fit(judge, judge.loss, batches(pixels, labels, batch, seed), steps, lr=4e-3, seed=seed, bf16=True, tell=tell)
    return judge.requires_grad_(False).eval()


@torch.no_grad()
def judgements(judge: Judge, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, 128) and classes (n,) of uint8 pixels (n, 3, 32, 32)."""
    features = torch.cat([judge.features(part.float() / 255) for part in pixels.split(AT_ONCE)])
    return features, judge.classify(features).argmax(1)


def shared_judge(context: "Context", steps: int = 900) -> Judge:
    """The judge of a reproduction, trained once for all arms and seeds."""

    def make() -> dict[str, Tensor]:
        context.tell(f"judge: {steps} steps")
        return trained_judge(*context.train_pixels(SIDE, ITEMS), steps, tell=context.tell).state_dict()

    judge = Judge()
    judge.load_state_dict(shared(context, "judge", make))
    return judge.requires_grad_(False).eval()


def judged_samples(pixels: Tensor, labels: Tensor, context: "Context") -> dict[str, float]:
    """What the judge says of generated pixels, uint8 (n, 3, 32, 32), that should be of the classes `labels` (n,).

    fd             Frechet distance of its features to those of the test pictures; falls with n, so compare equal n
    accuracy       share that it puts in the right class; `real_accuracy` of the test pictures
    """
    judge = shared_judge(context)

    def make() -> dict[str, Tensor]:
        real, truth = context.test_pixels(SIDE, TEST_ITEMS)
        features, classes = judgements(judge, real)
        return {"features": features, "accuracy": classes.eq(truth).double().mean()}

    test = shared(context, "test-features", make)
    features, classes = judgements(judge, pixels)
    return {
        "fd": frechet_distance(features, test["features"]),
        "accuracy": float(classes.eq(labels).double().mean()),
        "real_accuracy": float(test["accuracy"]),
    }


def distance_to_training(pixels: Tensor, context: "Context") -> float:
    """Frechet distance of the judge's features to those of 10,000 training pictures: to choose settings by."""
    judge = shared_judge(context)

    def make() -> dict[str, Tensor]:
        return {"features": judgements(judge, context.train_pixels(SIDE, 10_000)[0])[0]}

    return frechet_distance(judgements(judge, pixels)[0], shared(context, "train-features", make)["features"])


# -- tokens ------------------------------------------------------------------------------------------------------------


def small_tokenizer(context: "Context", steps: int = 2000, name: str = "vq-vae-small", **changes: Any) -> Tokenizer:
    """A tokenizer of 8 x 8 tokens of 512 codes, trained once for all arms and seeds: `steps` of 64 pictures.

    `name` may be another tokenizer that needs no teacher, `changes` are fields of its config.
    """
    torch.manual_seed(0)
    tokenizer = vistok.create(name, **{"codebook_size": CODES, **changes})

    def make() -> dict[str, Tensor]:
        context.tell(f"tokenizer {name}: {steps} steps")
        data = batches(*context.train_pixels(SIDE, ITEMS), 64, 0)
        tokenizer.to(memory_format=torch.channels_last)
        fit(tokenizer, tokenizer.loss, data, steps, bf16=True, tell=context.tell)
        return tokenizer.state_dict()

    tokenizer.load_state_dict(shared(context, f"tokenizer-{name}", make))
    return tokenizer.requires_grad_(False).eval()


def training_codes(context: "Context", tokenizer: Tokenizer, name: str = "codes") -> dict[str, Tensor]:
    """{"codes": (n, N[, C]), "labels": (n,)}, long, of all training pictures; read from disk where they are there."""

    def make() -> dict[str, Tensor]:
        pixels, labels = context.train_pixels(SIDE, ITEMS)
        return {"codes": encoded(tokenizer, pixels).short(), "labels": labels.short()}

    return {key: value.long() for key, value in shared(context, name, make).items()}


def encoded(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    """Codes (n, N[, C]), long, of uint8 pixels (n, 3, H, W)."""
    parts = [tokenizer.encode(part).codes for part in pixels.split(AT_ONCE)]
    return torch.cat(parts)


def token_batches(found: dict[str, Tensor], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches {"codes", "label"} without end, in an order that the seed decides; all items where they are fewer."""
    size = min(size, len(found["codes"]))
    rng = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(found["codes"]), generator=rng).split(size):
            if len(rows) == size:
                yield {"codes": found["codes"][rows], "label": found["labels"][rows]}


def drawn(
    generator: "Generator", tokenizer: Tokenizer, count: int = 1000, seed: int = 0, at_once: int = 100, **options: Any
) -> tuple[Tensor, Tensor]:
    """`count` pictures, uint8 (count, 3, 32, 32), and their classes, in turn: 0..9, 0..9, ..

    `options` are those of `generate`: guidance, temperature, top_k, steps, ...
    """
    labels = torch.arange(count) % CLASSES
    pictures = []
    for first in range(0, count, at_once):
        part = labels[first : first + at_once]
        tokens = generator.generate(part, seed=seed * count + first, **options)
        pictures.append(tokenizer.decode(tokens, dtype=torch.uint8))
    return torch.cat(pictures), labels
