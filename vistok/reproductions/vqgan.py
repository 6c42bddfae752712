"""The VQGAN line's claim at small scale: few, normalised dimensions keep a codebook in use (LlamaGen's step).

    pixels (B, 3, 32, 32) -> CNN, f 4 -> (B, 8 x 8, D) -> 1024 codes -> CNN -> pixels

    low-dim   D 8, latents and codes of unit length: LlamaGen's codebook
    plain     D 64, plain L2: VQGAN's

Everything else is alike: network, data, batches, squared error with the quantizer's terms, Adam.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, of, ratio
from vistok.reproductions._rebuilding import rebuilding

NETWORK = {"width": 32, "multipliers": [1, 1, 2], "blocks": 1, "latent_dim": 64, "attention": []}
RECIPE: dict[str, Any] = {
    "data": {"size": 32},
    "optimizer": {"name": "adam", "lr": 1e-3, "betas": [0.9, 0.95], "warmup": 25, "final": 0.1},
    "train": {"ema": None, "channels_last": True},
}
TESTED = 2000


def codebook(seed: int, context: Context, *, dim: int, kind: str) -> Mapping[str, float]:
    """One codebook of 1024 codes of `dim` numbers, tested."""
    model = {"name": "vqgan-llamagen-tiny", "cnn": NETWORK, "codebook_size": 1024, "code_dim": dim, "codebook": kind}
    trained = context.train({"model": model, **RECIPE})
    return rebuilding(trained, context.test_pixels(32, TESTED)[0])


REPRODUCTION = Reproduction(
    slug="vqgan",
    title="VQGAN: a codebook of few, normalised dimensions",
    claim="a codebook of 8 dimensions whose codes have unit length stays in use and rebuilds no worse than a plain one "
    "of many dimensions",
    source="LlamaGen, arXiv:2406.06525, section 3.1; the plain codebook is VQGAN's, arXiv:2012.09841",
    checked="CIFAR-10, 64 codes a picture, squared error without perceptual and adversarial terms; usage is the share "
    "of 1024 codes that occurs in 2000 test pictures. rFID is not checked. Usage depends on the codebook's initial "
    "scale (U(-1/K, 1/K) in both, as the authors have it), on the learning rate and on the batch size, and this run is "
    "short: it shows how the codebooks start, not where they would end",
    baseline="plain",
    arms={
        "low-dim": Arm("1024 codes of 8 numbers, unit length", partial(codebook, dim=8, kind="cosine"), 1),
        "plain": Arm("1024 codes of 64 numbers, plain L2", partial(codebook, dim=64, kind="plain"), 1),
    },
    rule=(
        Condition("usage, low-dim over plain", ratio("usage", "low-dim", over="plain"), at_least=2.0),
        Condition("test error, low-dim over plain", ratio("mse", "low-dim", over="plain"), at_most=1.05),
        Condition("usage of low-dim", of("low-dim", "usage"), at_least=0.02),
    ),
    steps=300,
    batch=16,
    report=("mse", "usage", "perplexity"),
)
