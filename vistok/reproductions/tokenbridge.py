"""TokenBridge's claim at small scale: rounding a trained VAE costs nothing, and its codes are predicted one by one.

A small VAE is trained once and frozen. Its latents are rounded to 2^b levels a number, b = 2..8. The masked generator
learns the codes of b = 6 with its head over dimensions, or, as in the ablation of the paper, with the same blocks that
see no codes and predict all dimensions at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, of, ratio
from vistok.generators.tokenbridge import VARIANTS, TokenBridgeGenerator
from vistok.quantize import GaussianQuantizer
from vistok.quantize.normal import NormalLevels, NormalQuantizer
from vistok.reproductions._small import SmallDecoder, SmallEncoder, batches, fit, shared

WIDTHS, DIM = (32, 64, 64), 8
BITS = tuple(range(2, 9))
ITEMS, TEST_ITEMS, VAE_STEPS = 20_000, 2000, 1000


class SmallVAE(nn.Module):
    """32x32 pictures to 4x4 tokens of 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = SmallEncoder(WIDTHS, 2 * DIM), SmallDecoder(WIDTHS, DIM)
        self.gaussian = GaussianQuantizer(DIM, weight=1e-6)

    def moments(self, pixels: Tensor) -> Tensor:
        """(B, N, 2 D)."""
        return self.encoder(pixels).flatten(2).transpose(1, 2)

    def latent(self, pixels: Tensor) -> Tensor:
        """Means (B, N, D)."""
        return self.gaussian.encode(self.moments(pixels))

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, 3, 32, 32) of latents (B, N, D)."""
        return self.decoder(latent.transpose(1, 2).unflatten(2, (4, 4)))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Squared error and KL divergence, both summed over an image and divided by its number of values."""
        seeds = torch.randint(2**62, (len(batch["pixels"]),), generator=rng).tolist()
        out = self.gaussian(self.moments(batch["pixels"]), seed=seeds)
        values = batch["pixels"][0].numel()
        error = (self.decode(out.vectors) - batch["pixels"]).square().mean()
        return {"squared": error, "kl": out.losses["kl"] / values}


@torch.no_grad()
def in_parts(function: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    """`function` of uint8 pixels, as float in [0, 1], 200 at a time."""
    return torch.cat([function(part.float() / 255) for part in data.split(200)])


def rounding(vae: SmallVAE, quantizer: NormalQuantizer, test: Tensor) -> dict[str, float]:
    """Mean PSNR in dB with the continuous latent ("continuous") and with b bits ("2", .., "8")."""
    latent = in_parts(vae.latent, test)
    rounded = {"continuous": latent}
    for bits in BITS:
        levels = NormalLevels(bits)
        rounded[str(bits)] = quantizer.restore(levels.decode(levels.encode(quantizer.standardise(latent))))
    found = {}
    with torch.no_grad():
        for name, vectors in rounded.items():
            pairs = zip(vectors.split(200), test.split(200), strict=True)
            errors = [(vae.decode(z).clamp(0, 1) - x.float() / 255).square().mean((1, 2, 3)) for z, x in pairs]
            found[name] = float(-10 * torch.cat(errors).log10().mean())
    return found


def dependence(latent: Tensor) -> float:
    """Mean over channels of the R^2 of each, regressed on the others at the same position."""
    rows = latent.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    inverse = torch.linalg.inv(rows.T @ rows / len(rows))
    return float((1 - 1 / (inverse.diagonal() * rows.square().mean(0))).mean())


def head(
    kind: str, codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor, steps: int, seed: int, tell: Any
) -> float:
    """Cross-entropy per dimension on test pictures, at the same masks for every head, after training one of `kind`."""
    torch.manual_seed(seed)
    config = replace(VARIANTS["tokenbridge-generator-tiny"], channel_head=kind)  # type: ignore[arg-type]
    model = TokenBridgeGenerator(config)

    def data() -> Iterator[dict[str, Any]]:
        rng = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(codes), generator=rng).split(64):
                yield {"codes": codes[rows], "label": labels[rows]}

    fit(model, model.loss, data(), steps, lr=1e-3, seed=seed, tell=tell)
    masks = torch.rand(len(test_codes), config.positions, generator=torch.Generator().manual_seed(99)).argsort(1)
    values = []
    with torch.no_grad():
        for rows in torch.arange(len(test_codes)).split(200):
            masked = masks[rows, : 3 * config.positions // 4]
            batch = {"codes": test_codes[rows], "label": test_labels[rows], "masked": masked}
            values.append(len(rows) * float(model.loss(batch, 0, torch.Generator())["cross_entropy"]))
    return sum(values) / len(test_codes)


def prepared(context: Context) -> dict[str, Tensor]:
    """The VAE's weights, codes and labels of both halves of the data, PSNR of "continuous" and of every b, and R^2."""

    def make() -> dict[str, Tensor]:
        pixels, labels = context.train_pixels(32, ITEMS)
        test_pixels, test_labels = context.test_pixels(32, TEST_ITEMS)
        torch.manual_seed(0)
        vae = SmallVAE()
        fit(vae, vae.loss, batches(pixels, labels, context.batch, 0), VAE_STEPS, tell=context.tell)
        latent = in_parts(vae.latent, pixels)
        quantizer = NormalQuantizer(DIM, momentum=1.0)
        quantizer.observe(latent)
        psnr = rounding(vae, quantizer, test_pixels)
        return {
            "psnr": torch.tensor([psnr["continuous"], *(psnr[str(bits)] for bits in BITS)], dtype=torch.float64),
            "r2": torch.tensor(dependence(latent), dtype=torch.float64),
            "codes": quantizer.encode(latent),
            "labels": labels,
            "test_codes": quantizer.encode(in_parts(vae.latent, test_pixels)),
            "test_labels": test_labels,
        }

    return shared(context, "vae", make)


def rounded(seed: int, context: Context) -> dict[str, float]:
    """What rounding to b bits loses, in dB; the most that one more bit ever lost; R^2 of a channel on the others."""
    found = prepared(context)
    losses = (found["psnr"][0] - found["psnr"][1:]).tolist()
    named = {f"loss_{bits}": loss for bits, loss in zip(BITS, losses, strict=True)}
    return {
        "psnr": float(found["psnr"][0]),
        **named,
        "largest_rise": max(after - before for before, after in pairwise(losses)),
        "r2": float(found["r2"]),
    }


def predicted(seed: int, context: Context, *, kind: str) -> dict[str, float]:
    """Cross-entropy of one kind of head, in nats a dimension, on test pictures."""
    found = prepared(context)
    data = (found["codes"], found["labels"], found["test_codes"], found["test_labels"])
    return {"cross_entropy": head(kind, *data, context.steps, seed, context.tell)}


REPRODUCTION = Reproduction(
    slug="tokenbridge",
    title="TokenBridge: a VAE rounded after training, its dimensions predicted one by one",
    claim="rounding each number of a trained VAE to 64 levels keeps its quality, and an autoregressive head over the "
    "numbers beats predicting them independently",
    source="arXiv:2503.16430, sections 3.2 and 4.3",
    checked="reconstruction in PSNR on CIFAR-10, and the cross-entropy of the head at the same masks; FID against "
    "continuous MAR cannot be checked here. A strong KL term would make channels independent and leave little to gain: "
    "r2 is the share of a channel that the others explain.",
    baseline="parallel",
    arms={
        "rounded": Arm("the frozen VAE, rounded to 2 to 8 bits a number", rounded, 8, steps=VAE_STEPS, seeds=1),
        "parallel": Arm("all dimensions at once, from the same blocks", partial(predicted, kind="parallel"), 3),
        "autoregressive": Arm("one dimension after another", partial(predicted, kind="autoregressive"), 3),
    },
    rule=(
        Condition("dB that six bits lose", of("rounded", "loss_6"), at_most=0.1),
        Condition("dB that two bits lose", of("rounded", "loss_2"), at_least=1.5),
        Condition("dB that one bit more loses, at worst", of("rounded", "largest_rise"), at_most=0.02),
        Condition(
            "cross-entropy one by one over all at once",
            ratio("cross_entropy", "autoregressive", "parallel"),
            at_most=0.98,
        ),
    ),
    steps=600,
    batch=64,
    report=("cross_entropy", "psnr", "loss_2", "loss_4", "loss_6", "r2"),
)
