"""FQGAN's claims at small scale: two small codebooks beat one, and can be kept apart and given meaning.

A small convolutional tokenizer with 8x8 positions on 32x32 pictures; squared error and codebook losses, the entropy
term in all arms, heads of the same depth. The teacher of the last arm is the pooled feature of a small network trained
on the labels here, in place of CLIP.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, of, ratio
from vistok.losses.representation import contrastive
from vistok.quantize import EntropyTerm, VectorQuantizer
from vistok.quantize.product import ProductQuantizer, squared_cosine
from vistok.reproductions._small import (
    FEATURE,
    Residual,
    SmallDecoder,
    SmallEncoder,
    Teacher,
    batches,
    fit,
    probe,
    teacher,
)

WIDTHS, DIM = (32, 64), 8
ITEMS, TEST_ITEMS, TEACHER_STEPS, PROBED = 20_000, 2000, 300, 10_000
ARMS: dict[str, tuple[dict[str, int], float, bool]] = {  # codebooks, disentanglement, whether there is a teacher
    "one": ({"vis": 128}, 0.0, False),
    "one-4096": ({"vis": 4096}, 0.0, False),
    "dual": ({"vis": 64, "sem": 64}, 0.0, False),
    "apart": ({"vis": 64, "sem": 64}, 0.1, False),
    "taught": ({"vis": 64, "sem": 64}, 0.1, True),
}


class Small(nn.Module):
    """The tokenizer of one arm: a shared trunk, a residual block and a projection for every codebook."""

    def __init__(self, codebooks: dict[str, int], disentangle: float, teacher: Teacher | None) -> None:
        super().__init__()
        width, count = WIDTHS[-1], len(codebooks)
        self.trunk = SmallEncoder(WIDTHS, width)
        self.heads = nn.ModuleList(
            nn.Sequential(Residual(width), nn.SiLU(), nn.Conv2d(width, DIM, 1)) for _ in codebooks
        )
        self.quantizer = ProductQuantizer(
            {
                name: VectorQuantizer(DIM, size, metric="cosine", entropy=EntropyTerm(weight=0.03))
                for name, size in codebooks.items()
            },
            disentangle=disentangle,
        )
        self.decoder = SmallDecoder(WIDTHS, count * DIM)
        self.predict = (
            None if teacher is None else nn.Sequential(nn.Linear(DIM, FEATURE), nn.SiLU(), nn.Linear(FEATURE, FEATURE))
        )
        self._teacher = (teacher,)

    def latent(self, pixels: Tensor) -> Tensor:
        """(B, N, C d)."""
        trunk = self.trunk(pixels)
        return torch.cat([head(trunk) for head in self.heads], 1).flatten(2).transpose(1, 2)

    def decode(self, vectors: Tensor) -> Tensor:
        """Pixels of code vectors (B, N, C d)."""
        return self.decoder(vectors.transpose(1, 2).unflatten(2, (8, 8)))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Squared error in [-1, 1], the quantizer's terms, and the contrastive one of a taught arm."""
        out = self.quantizer(self.latent(batch["pixels"]))
        terms = {"squared": 4 * (self.decode(out.vectors) - batch["pixels"]).square().mean(), **out.losses}
        teacher = self._teacher[0]
        if teacher is not None and self.predict is not None:
            with torch.no_grad():
                feature = teacher(batch["pixels"])
            predicted = self.predict(self.quantizer.part("sem", out.vectors)).mean(1)
            terms["representation"] = 0.5 * contrastive(predicted, feature)
        return terms


@torch.no_grad()
def examine(model: Small, test: Tensor) -> dict[str, float]:
    """On test pictures: squared error in [0, 1], least share of a codebook in use, mean cos^2 of paired vectors."""
    model.quantizer.usage.reset()
    errors, cosines = [], []
    for part in test.split(200):
        pixels = part.float() / 255
        out = model.quantizer(model.latent(pixels))
        errors.append((model.decode(out.vectors).clamp(0, 1) - pixels).square().mean())
        if len(model.quantizer.names) > 1:
            cosines.append(squared_cosine([model.quantizer.part(name, out.vectors) for name in model.quantizer.names]))
    found = {"mse": float(torch.stack(errors).mean()), "used": min(model.quantizer.usage.used())}
    return found | ({"cos2": float(torch.stack(cosines).mean())} if cosines else {})


@torch.no_grad()
def described(model: Small, name: str, pixels: Tensor) -> Tensor:
    """Code vectors of one codebook averaged to 4x4 and concatenated, (n, 16 d)."""
    found = []
    for part in pixels.split(200):
        vectors = model.quantizer.decode(model.quantizer.encode(model.latent(part.float() / 255)))
        grid = model.quantizer.part(name, vectors).transpose(1, 2).unflatten(2, (8, 8))
        found.append(F.adaptive_avg_pool2d(grid, 4).flatten(1))
    return torch.cat(found)


def arm(seed: int, context: Context, *, name: str) -> dict[str, float]:
    """An arm's numbers on test pictures: `examine`'s, and of a taught arm the accuracy of probes on both codebooks."""
    codebooks, disentangle, taught = ARMS[name]
    pixels, labels = context.train_pixels(32, ITEMS)
    test_pixels, test_labels = context.test_pixels(32, TEST_ITEMS)
    guide = teacher(context, pixels, labels, TEACHER_STEPS) if taught else None
    torch.manual_seed(seed)
    model = Small(codebooks, disentangle, guide)
    data = batches(pixels, labels, context.batch, seed)
    fit(model, model.loss, data, context.steps, seed=seed, tell=context.tell)
    found = examine(model, test_pixels)
    if taught:
        some = slice(0, PROBED)
        for codebook in codebooks:
            seen = described(model, codebook, pixels[some]), labels[some]
            found[f"probe_{codebook}"] = probe(*seen, described(model, codebook, test_pixels), test_labels)
        found["probe_gain"] = found["probe_sem"] - found["probe_vis"]
    return found


WHAT = {
    "one": "one codebook of 128: the same number of code vectors",
    "one-4096": "one codebook of 4096: the same 12 bits a position",
    "dual": "two codebooks of 64, no disentanglement",
    "apart": "dual, with disentanglement 0.1",
    "taught": "apart, and the semantic codes predict a teacher's feature",
}

REPRODUCTION = Reproduction(
    slug="fqgan",
    title="FQGAN: two small codebooks beat one, kept apart and given meaning",
    claim="factorising one codebook into several improves reconstruction; disentanglement and representation learning "
    "keep the factors apart and give them meaning",
    source="arXiv:2411.16681, section 4 and its ablation",
    checked="squared error on CIFAR-10, the cosine between paired code vectors, and a linear probe. Two codebooks of "
    "64 spend 12 bits a position against 7, which is the point, hence the arm of 4096. The teacher has seen the "
    "labels: the probe shows only that meaning went where it was sent. rFID, what the representation loss gains "
    "for it, and FAR are not checked.",
    baseline="one",
    arms={name: Arm(WHAT[name], partial(arm, name=name), 3.5) for name in ARMS},
    rule=(
        Condition("error of two codebooks over that of one of 128", ratio("mse", "dual", "one"), at_most=0.85),
        Condition("share in use of the lesser sub-codebook", of("dual", "used"), at_least=0.9),
        Condition("error of two codebooks over that of one of 4096", ratio("mse", "dual", "one-4096"), at_most=1.05),
        Condition("cos^2 with disentanglement over without", ratio("cos2", "apart", "dual"), at_most=0.5),
        Condition("error with disentanglement over without", ratio("mse", "apart", "dual"), at_most=1.05),
        Condition("points that a probe gains on semantic codes", of("taught", "probe_gain"), at_least=5),
    ),
    steps=300,
    batch=64,
    report=("mse", "used", "cos2", "probe_vis", "probe_sem"),
)
