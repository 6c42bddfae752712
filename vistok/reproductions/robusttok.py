"""RobustTok's claim at small scale: a decoder trained on perturbed codes bears a generator's mistakes.

A small convolutional tokenizer with 8x8 positions on 32x32 pictures, 512 codes of 16 numbers and unit length, squared
error and codebook losses. Both arms are alike but for the perturbation, which falls to half between 20 % and 60 % of
the steps, as in the paper. On each arm's tokens a small autoregressive transformer learns to generate.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, ratio
from vistok.generators.robusttok import RAR, RARConfig
from vistok.metrics.frechet import frechet_distance
from vistok.quantize import VectorQuantizer
from vistok.quantize.perturbation import neighbours, perturb
from vistok.quantize.rotation import straight_through
from vistok.reproductions._small import SmallDecoder, SmallEncoder, Teacher, batches, fit, teacher
from vistok.tokenizers.robusttok import Perturbation

WIDTHS, CODES, DIM, SIDE = (32, 64), 512, 16, 8
ITEMS, TEST_ITEMS, TEACHER_STEPS, MODELLED, SAMPLES = 20_000, 2000, 300, 10_000, 1000
RATES, STRENGTHS = (0.5, 0.7, 0.9), (26, 46)  # 5 % and 9 % of the codes
GENERATOR = RARConfig(
    width=96,
    depth=3,
    heads=4,
    hidden=384,
    codebook_size=CODES,
    grid=(SIDE, SIDE),
    factor=4,
    classes=10,
    dropout=0.0,
    anneals=(0, 0),
)
GENERATOR_STEPS, GENERATOR_BATCH = 300, 32


class Small(nn.Module):
    """The tokenizer of one arm."""

    def __init__(self, rule: Perturbation | None) -> None:
        super().__init__()
        self.encoder, self.decoder = SmallEncoder(WIDTHS, DIM), SmallDecoder(WIDTHS, DIM)
        self.quantizer = VectorQuantizer(DIM, CODES, metric="cosine")
        self.rule = rule

    def latent(self, pixels: Tensor) -> Tensor:
        """(B, N, D), of unit length."""
        return F.normalize(self.encoder(pixels).flatten(2).transpose(1, 2), dim=-1)

    def decode(self, vectors: Tensor) -> Tensor:
        """Pixels of code vectors (B, N, D)."""
        return self.decoder(vectors.transpose(1, 2).unflatten(2, (SIDE, SIDE)))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Squared error in [-1, 1] and the quantizer's terms."""
        z = self.latent(batch["pixels"])
        out = self.quantizer(z)
        vectors = out.vectors
        if self.rule is not None:
            (rate, strength), count = self.rule.at(step), self.rule.images(len(z))
            codes = exchanged(self, z[:count], out.codes[:count], rate, strength, rng)  # type: ignore[index]
            vectors = torch.cat([straight_through(z[:count], self.quantizer.decode(codes)), vectors[count:]])
        return {"squared": 4 * (self.decode(vectors) - batch["pixels"]).square().mean(), **out.losses}


def exchanged(model: Small, z: Tensor, codes: Tensor, rate: float, strength: int, rng: torch.Generator) -> Tensor:
    """Codes (B, N) perturbed by draws of `rng`."""
    chance = torch.rand(codes.shape, generator=rng)
    rank = torch.randint(strength, codes.shape, generator=rng)
    table = model.quantizer.table().detach()
    return perturb(z.detach(), table, codes, rate=rate, strength=strength, chance=chance, rank=rank)


@torch.no_grad()
def examine(model: Small, test: Tensor) -> dict[str, float]:
    """On test pictures: squared error in [0, 1] of ordinary codes ("mse"), what perturbed and uniformly drawn codes add
    to it ("excess", "excess_uniform"), and how far an exchange moves a vector, of the mean distance of codes ("swap").
    """
    rng = torch.Generator().manual_seed(0)  # the same draws for all arms and seeds
    sums = {"mse": 0.0, "excess": 0.0, "excess_uniform": 0.0, "swap": 0.0}
    table = model.quantizer.table()
    spread = torch.cdist(table, table).mean()
    for part in test.split(200):
        pixels, share = part.float() / 255, len(part) / len(test)
        z = model.latent(pixels)
        codes = model.quantizer.encode(z)

        def error(codes: Tensor, pixels: Tensor = pixels) -> float:
            return float((model.decode(model.quantizer.decode(codes)).clamp(0, 1) - pixels).square().mean())

        clean = error(codes)
        perturbed = [exchanged(model, z, codes, rate, strength, rng) for rate in RATES for strength in STRENGTHS]
        anywhere = torch.where(torch.rand(codes.shape, generator=rng) < 0.1, torch.randint_like(codes, CODES), codes)
        sums["mse"] += share * clean
        sums["excess"] += share * (sum(map(error, perturbed)) / len(perturbed) - clean)
        sums["excess_uniform"] += share * (error(anywhere) - clean)
        near = neighbours(z.flatten(0, 1), table, STRENGTHS[0])
        moved = (table[near[:, 1:]] - table[near[:, :1]]).norm(dim=2).mean()
        sums["swap"] += share * float(moved / spread)
    return sums


def generated(model: Small, pixels: Tensor, labels: Tensor, seed: int, context: Context) -> tuple[Tensor, float]:
    """SAMPLES pictures of a transformer that learned this arm's tokens, uint8, and its loss on unseen tokens."""
    with torch.no_grad():
        codes = torch.cat([model.quantizer.encode(model.latent(part.float() / 255)) for part in pixels.split(200)])
    torch.manual_seed(seed)
    generator = RAR(GENERATOR)
    held = len(codes) // 20
    rng = torch.Generator().manual_seed(seed)

    def data() -> Any:
        while True:
            rows = held + torch.randint(len(codes) - held, (GENERATOR_BATCH,), generator=rng)
            yield {"codes": codes[rows], "label": labels[rows]}

    fit(generator, generator.loss, data(), GENERATOR_STEPS, seed=seed, tell=context.tell)
    with torch.no_grad():
        unseen = generator.loss({"codes": codes[:held], "label": labels[:held]}, GENERATOR_STEPS, rng)["code"]
        pictures = []
        for first in range(0, SAMPLES, 250):
            classes = [item % 10 for item in range(first, first + 250)]
            tokens = generator.generate(classes, guidance=1.0, temperature=1.0, seed=seed * SAMPLES + first)
            assert tokens.codes is not None
            pictures.append(model.decode(model.quantizer.decode(tokens.codes)).clamp(0, 1))
    return (torch.cat(pictures) * 255 + 0.5).to(torch.uint8), float(unseen)


@torch.no_grad()
def features(guide: Teacher, pixels: Tensor) -> Tensor:
    """Pooled features (n, 64) of uint8 pixels."""
    return torch.cat([guide(part.float() / 255) for part in pixels.split(200)])


def arm(seed: int, context: Context, *, perturbs: bool) -> dict[str, float]:
    """An arm's numbers: `examine`'s, the generator's loss, and the Frechet distance of its pictures."""
    pixels, labels = context.train_pixels(32, ITEMS)
    test = context.test_pixels(32, TEST_ITEMS)[0]
    guide = teacher(context, pixels, labels, TEACHER_STEPS)
    fades = (context.steps // 5, 3 * context.steps // 5)
    torch.manual_seed(seed)
    model = Small(Perturbation(rate=1.0, share=0.1, strength=12, fades=fades) if perturbs else None)
    fit(model, model.loss, batches(pixels, labels, context.batch, seed), context.steps, seed=seed, tell=context.tell)
    found = examine(model, test)
    pictures, unseen = generated(model, pixels[:MODELLED], labels[:MODELLED], seed, context)
    distance = frechet_distance(features(guide, pictures), features(guide, test))
    return found | {"nll": unseen, "frechet": distance}


REPRODUCTION = Reproduction(
    slug="robusttok",
    title="RobustTok: a decoder that has seen wrong tokens",
    claim="perturbing codes in training makes the decoder robust to them at a small cost on clean ones, and generated "
    "pictures better",
    source="arXiv:2503.08354, section 3.2 and tables 1 and 2",
    checked="squared error on CIFAR-10 with ordinary and with perturbed codes, and the Frechet distance of generated "
    "pictures in the features of a small classifier. The test's exchanges are of the family that training uses; "
    "uniform ones are reported beside them. A robust decoder may come with tokens that are harder to model: the "
    "generator's loss is reported. rFID, and pFID against gFID over many tokenizers, are not checked.",
    baseline="plain",
    arms={
        "perturbed": Arm(
            "a tenth of each batch exchanged among 12 neighbours, later 6", partial(arm, perturbs=True), 3
        ),
        "plain": Arm("the same without exchanges", partial(arm, perturbs=False), 3),
    },
    rule=(
        Condition("excess error of perturbed codes", ratio("excess", "perturbed", "plain"), at_most=0.85),
        Condition("error of ordinary codes", ratio("mse", "perturbed", "plain"), at_most=1.1),
        Condition("Frechet distance of generated pictures", ratio("frechet", "perturbed", "plain"), at_most=0.95),
    ),
    steps=400,
    batch=64,
    report=("mse", "excess", "excess_uniform", "swap", "nll", "frechet"),
)
