"""FQGAN's claims at small scale: two small codebooks beat one, and can be kept apart and given meaning.

A small convolutional tokenizer with 8x8 positions on 32x32 pictures; squared error and codebook losses, the entropy
term in all arms; two seeds.

    one      one codebook of 128: the paper's baseline, the same number of code vectors
    one-4096 one codebook of 4096: the same 12 bits a position
    dual     two codebooks of 64, no disentanglement
    apart    dual with disentanglement 0.1
    taught   apart, and the semantic codes predict a teacher's feature of the image

Shown, in both seeds, on test pictures: the error of dual is at most 0.85 of one's with at least 90 % of each
sub-codebook in use; at most 1.05 of one-4096's; the mean cos^2 of paired code vectors in apart at most half of dual's,
at an error of at most 1.05 of dual's; a linear probe on the semantic codes of taught beats one on its visual codes by 5
points.

The teacher is the pooled feature of a small network trained on the labels here, in place of CLIP: the probe shows only
that meaning went where it was sent. rFID, what the representation loss gains for it, and FAR are not checked.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.losses.representation import contrastive
from vistok.quantize import EntropyTerm, VectorQuantizer
from vistok.quantize.product import ProductQuantizer, squared_cosine
from vistok.reproductions._small import Residual, SmallDecoder, SmallEncoder, batches, fit, pictures, probe

WIDTHS, DIM, FEATURE = (32, 64), 8, 64
ARMS: dict[str, tuple[dict[str, int], float, bool]] = {  # codebooks, disentanglement, whether there is a teacher
    "one": ({"vis": 128}, 0.0, False),
    "one-4096": ({"vis": 4096}, 0.0, False),
    "dual": ({"vis": 64, "sem": 64}, 0.0, False),
    "apart": ({"vis": 64, "sem": 64}, 0.1, False),
    "taught": ({"vis": 64, "sem": 64}, 0.1, True),
}


class Teacher(nn.Module):
    """A small classifier; its pooled features (B, 64) teach."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = SmallEncoder((32, 64, 64), FEATURE)
        self.classify = nn.Linear(FEATURE, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.silu(self.trunk(pixels)).mean((2, 3))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy with the labels."""
        return {"cross_entropy": F.cross_entropy(self.classify(self(batch["pixels"])), batch["label"])}


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
def examine(model: Small, test: Tensor) -> dict[str, Any]:
    """On test pictures: squared error in [0, 1], share of each codebook in use, mean cos^2 of paired code vectors."""
    model.quantizer.usage.reset()
    errors, cosines = [], []
    for part in test.split(200):
        pixels = part.float() / 255
        out = model.quantizer(model.latent(pixels))
        errors.append((model.decode(out.vectors).clamp(0, 1) - pixels).square().mean())
        if len(model.quantizer.names) > 1:
            cosines.append(squared_cosine([model.quantizer.part(name, out.vectors) for name in model.quantizer.names]))
    found: dict[str, Any] = {"mse": float(torch.stack(errors).mean()), "used": model.quantizer.usage.used()}
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


def measure(
    train: Any,
    test: Any,
    *,
    steps: int = 1200,
    teacher_steps: int = 1500,
    seeds: tuple[int, ...] = (0, 1),
    items: int = 50_000,
    test_items: int = 2000,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every arm's numbers, a list over seeds. `train` and `test` are what `open_source` takes, with labels."""
    pixels, labels = pictures(train, items)
    test_pixels, test_labels = pictures(test, test_items)
    torch.manual_seed(0)
    teacher = Teacher()
    tell(f"teacher: {teacher_steps} steps")
    fit(teacher, teacher.loss, batches(pixels, labels, 64, 0), teacher_steps, tell=tell)
    teacher.requires_grad_(False)
    found: dict[str, Any] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm, (codebooks, disentangle, taught) in ARMS.items():
            torch.manual_seed(seed)
            model = Small(codebooks, disentangle, teacher if taught else None)
            tell(f"{arm}, seed {seed}: {steps} steps")
            fit(model, model.loss, batches(pixels, labels, 64, seed), steps, seed=seed, tell=tell)
            numbers = examine(model, test_pixels)
            if taught:
                some = slice(0, min(10_000, len(pixels)))
                for name in codebooks:
                    seen = described(model, name, pixels[some]), labels[some]
                    numbers[f"probe_{name}"] = probe(*seen, described(model, name, test_pixels), test_labels)
            found[arm].append(numbers)
            tell(f"{arm}, seed {seed}: {numbers}")
    return found


def judge(found: dict[str, Any]) -> dict[str, bool]:
    """The rules of the docstring, applied to what `measure` gave."""
    shown = {
        "two codebooks of 64 beat one of 128": True,
        "each sub-codebook is in use": True,
        "they are as good as one of the same bits": True,
        "disentanglement halves cos^2 at no cost": True,
        "meaning goes into the semantic codes": True,
    }
    for one, large, dual, apart, taught in zip(*(found[arm] for arm in ARMS), strict=True):
        told = (
            dual["mse"] <= 0.85 * one["mse"],
            min(dual["used"]) >= 0.9,
            dual["mse"] <= 1.05 * large["mse"],
            apart["cos2"] <= 0.5 * dual["cos2"] and apart["mse"] <= 1.05 * dual["mse"],
            taught["probe_sem"] >= taught["probe_vis"] + 5,
        )
        shown = {claim: before and now for (claim, before), now in zip(shown.items(), told, strict=True)}
    return shown
