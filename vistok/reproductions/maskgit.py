"""MaskBit's and MaskGIT's claims at small scale, on the same sign bits.

CIFAR-10 -> VQGAN+ with 10 sign bits, f = 4 -> codes (50000, 64)                                   shared by all
codes -> MaskGIT of 4 blocks that reads bits, or a table's vectors; equal mask draws -> masked NLL on test pictures
the one that reads bits -> 1,000 pictures in 8 steps, the surest kept or any kept -> Frechet distance
"""

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import vistok
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, of, ratio
from vistok.metrics.frechet import frechet_distance
from vistok.quantize import LFQ, EntropyTerm
from vistok.reproductions._generation import (
    ITEMS,
    SIDE,
    drawn,
    judged_samples,
    judgements,
    shared_judge,
    token_batches,
    training_codes,
)
from vistok.reproductions._small import batches, fit, shared
from vistok.sampling.masking import mask_exactly
from vistok.tokenizer import Tokenizer
from vistok.tokenizers.vq_vae import VARIANTS, VQVAE

if TYPE_CHECKING:
    from vistok.evaluation.reproducing import Context
    from vistok.generators.maskgit import MaskGIT

BITS, GROUPS, STEPS = 10, 2, 8
TOKENIZER_STEPS, JUDGE_STEPS = 1000, 700
RATIOS = (0.3, 0.5, 0.7, 0.9)
TEST_ITEMS, SAMPLES = 1000, 1000
CHOICES = (1.0, 4.5, 10.0)
RANDOM = 1e6  # a choice temperature at which the noise decides alone


class BitVQVAE(VQVAE):
    """The small convolutional autoencoder with sign bits: codes of ten bits, the first channel the lowest."""

    def __init__(self) -> None:
        super().__init__(replace(VARIANTS["vq-vae-small"], codebook_size=2**BITS, code_dim=BITS))
        entropy = EntropyTerm(weight=0.1, temperature=1.0, log="clamp")
        self.quantizer = LFQ(BITS, bit_order="lsb", entropy=entropy)  # type: ignore[assignment]


def bit_tokenizer(context: "Context") -> BitVQVAE:
    """The tokenizer, trained once."""
    torch.manual_seed(0)
    tokenizer: Any = BitVQVAE()

    def make() -> dict[str, Tensor]:
        context.tell(f"tokenizer: {TOKENIZER_STEPS} steps")
        tokenizer.to(memory_format=torch.channels_last)
        data = batches(*context.train_pixels(SIDE, ITEMS), 64, 0)
        fit(tokenizer, tokenizer.loss, data, TOKENIZER_STEPS, bf16=True, tell=context.tell)
        return tokenizer.state_dict()

    tokenizer.load_state_dict(shared(context, "tokenizer", make))
    return tokenizer.requires_grad_(False).eval()


def held_out_codes(context: "Context", tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Codes and labels of the first test pictures, and the shares of 2^10 codes that training and they use."""

    def make() -> dict[str, Tensor]:
        pixels, labels = context.test_pixels(SIDE, TEST_ITEMS)
        tokens = tokenizer.encode(pixels)
        rebuilt = tokenizer.decode(tokens, dtype=torch.uint8)
        error = (rebuilt.double() - pixels.double()).square().flatten(1).mean(1)
        return {"codes": tokens.codes, "labels": labels, "psnr": (20 * math.log10(255) - 10 * error.log10()).mean()}

    return shared(context, "test-codes", make)


def generator(seed: int, reads: str) -> "MaskGIT":
    """Four post-norm blocks of width 96; the same but for what they read and, with a table, its use as output."""
    torch.manual_seed(seed)
    return vistok.create("maskbit-tiny", width=96, layers=4, heads=4, hidden=384, reads=reads, bits=BITS, groups=GROUPS)


def trained(seed: int, context: "Context", reads: str) -> tuple["MaskGIT", Tokenizer]:
    """The generator of one seed, from the other arms' folder where it is there. Masks are drawn from the seed alone."""
    tokenizer = bit_tokenizer(context)
    model = generator(seed, reads)
    model.attach(tokenizer)

    def make() -> dict[str, Tensor]:
        data = token_batches(training_codes(context, tokenizer), context.batch, seed)
        context.tell(f"generator that reads {reads}: {context.steps} steps")
        fit(model, model.loss, data, context.steps, seed=seed, tell=context.tell)
        return model.state_dict()

    model.load_state_dict(shared(context, f"{reads}-{seed}", make))
    return model.requires_grad_(False).eval(), tokenizer


def predicted(seed: int, context: "Context", *, reads: str) -> dict[str, float]:
    """Masked NLL in bits a picture, at four shares of masked groups and their mean, on masks that never change."""
    model, tokenizer = trained(seed, context, reads)
    found = held_out_codes(context, tokenizer)
    used = training_codes(context, tokenizer)["codes"].unique().numel() / 2**BITS
    numbers = {f"nll_{round(100 * share)}": masked_nll(model, found, share) for share in RATIOS}
    return {
        "nll": math.fsum(numbers.values()) / len(numbers),
        **numbers,
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "usage": used,
        "psnr": float(found["psnr"]),
    }


@torch.no_grad()
def masked_nll(model: "MaskGIT", found: dict[str, Tensor], share: float) -> float:
    """Bits a picture that the masked groups cost, given the others and the class."""
    groups = model.split(found["codes"])
    scores = torch.rand(groups.shape, generator=torch.Generator().manual_seed(round(1000 * share)))
    masked = mask_exactly(scores, torch.full((len(groups),), share))
    total = 0.0
    for part, hidden, labels in zip(groups.split(250), masked.split(250), found["labels"].split(250), strict=True):
        logits = model.logits(part.masked_fill(hidden, model.mask_id), labels)
        total += float(F.cross_entropy(logits[hidden].double(), part[hidden], reduction="sum"))
    return total / math.log(2) / len(groups)


def sampled(seed: int, context: "Context", *, choices: tuple[float, ...]) -> dict[str, float]:
    """What the judge says of pictures in eight steps, at the choice temperature that does best on training pictures."""
    model, tokenizer = trained(seed, context, "bits")
    tried = {}
    for choice in choices:
        context.tell(f"{SAMPLES} pictures at choice temperature {choice:g}")
        tried[choice] = drawn(model, tokenizer, SAMPLES, seed, steps=STEPS, choice_temperature=choice, guidance=1.0)
    distances = {choice: distance_to_training(pixels, context) for choice, (pixels, _) in tried.items()}
    best = min(distances, key=lambda choice: distances[choice])
    return {**judged_samples(*tried[best], context), "choice": best, "fd_train": distances[best]}


def distance_to_training(pixels: Tensor, context: "Context") -> float:
    """Frechet distance of the judge's features to those of the first 10,000 training pictures."""
    judge = shared_judge(context, JUDGE_STEPS)

    def make() -> dict[str, Tensor]:
        return {"features": judgements(judge, context.train_pixels(SIDE, 10_000)[0])[0]}

    return frechet_distance(judgements(judge, pixels)[0], shared(context, "train-features", make)["features"])


REPRODUCTION = Reproduction(
    slug="maskgit",
    title="MaskGIT and MaskBit: the surest are kept; bits in place of a table",
    claim="a masked generator may read the tokenizer's bits without a table of vectors (MaskBit), and keeping the "
    "surest tokens at each of a few steps beats keeping any (MaskGIT)",
    source="arXiv:2409.16211, section 3.2; arXiv:2202.04200, section 3.2",
    checked="CIFAR-10 at 8 x 8 codes of ten sign bits in two groups, from a small autoencoder whose entropy term "
    "has temperature 1; four blocks of width 96, 600 steps where the design had 1,500, so that all fits "
    "into 20 minutes of a core. MaskBit's gain is in the FID of large models and cannot be seen here: "
    "looked at is whether bits cost anything in masked NLL, with fewer parameters. A table of 32 rows is "
    "hardly worse than five bits, hence parity, not victory. Groups are drawn independently of each "
    "other. A low choice temperature makes sharp pictures of little variety. Frechet distances are in the "
    "features of a small classifier trained here, of 1,000 samples. Not run: one group of ten bits.",
    baseline="embedding",
    arms={
        "bits": Arm("reads the bits of both groups", partial(predicted, reads="bits"), 8),
        "embedding": Arm("reads, and predicts with, a table for each group", partial(predicted, reads="embedding"), 3),
        "confidence": Arm(
            "the model that reads bits, 8 steps, the surest kept, at the best of three choice temperatures",
            partial(sampled, choices=CHOICES),
            1.5,
        ),
        "random order": Arm("the same model, 8 steps, any kept", partial(sampled, choices=(RANDOM,)), 0.5),
    },
    rule=(
        Condition("share of the codes in use", of("bits", "usage"), at_least=0.9),
        Condition("masked NLL of bits over that of a table", ratio("nll", "bits", "embedding"), at_most=1.005),
        Condition("parameters, bits over a table", ratio("parameters", "bits", "embedding"), at_most=1.0),
        Condition(
            "Frechet distance, the surest kept over any kept", ratio("fd", "confidence", "random order"), at_most=0.95
        ),
    ),
    steps=600,
    batch=64,
    report=("nll", "nll_30", "nll_90", "parameters", "fd", "accuracy", "choice"),
)
