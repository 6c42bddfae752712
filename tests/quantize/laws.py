"""What every quantizer must satisfy, and one small instance of each to hold to it."""

from collections.abc import Callable

import torch

from vistok.quantize import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    EntropyTerm,
    MultiScaleVectorQuantizer,
    Quantizer,
    ResidualFSQ,
    ResidualVQ,
    SimVQ,
    VectorQuantizer,
)
from vistok.quantize.product import ProductQuantizer

POSITIONS = 9  # a 3 x 3 map, which the multi-scale quantizer needs

DISCRETE: dict[str, Callable[[], Quantizer]] = {
    "vq": lambda: VectorQuantizer(4, 16),
    "vq-cosine": lambda: VectorQuantizer(4, 16, metric="cosine", entropy=EntropyTerm()),
    "vq-ema": lambda: VectorQuantizer(4, 16, learning="ema"),
    "vq-ema-cosine-rotation": lambda: VectorQuantizer(4, 16, learning="ema", metric="cosine", estimator="rotation"),
    "vq-cvq": lambda: VectorQuantizer(4, 16, learning="cvq"),
    "vq-restart": lambda: VectorQuantizer(4, 16, restart_below=1.0),
    "fsq": lambda: FSQ((8, 5, 4)),
    "fsq-symmetric-2": lambda: FSQ((2, 4, 3), dim=5, num_codebooks=2, symmetric=True),
    "lfq": lambda: LFQ(5),
    "lfq-groups": lambda: LFQ((2, 3), dim=4, bit_order="lsb", entropy_over="joint"),
    "bsq": lambda: BSQ((4, 4), entropy_over="bit"),
    "rvq": lambda: ResidualVQ(4, 16, 3, learning="ema"),
    "rvq-shared": lambda: ResidualVQ(4, 16, 3, shared=True, learning="ema", dropout=0.5),
    "rfsq": lambda: ResidualFSQ((5, 5, 4), 2),
    "rfsq-projected": lambda: ResidualFSQ((5, 3), 2, dim=4),
    "simvq": lambda: SimVQ(4, 16),
    "ibq": lambda: IBQ(4, 16),
    "product": lambda: ProductQuantizer({"a": VectorQuantizer(4, 16), "b": VectorQuantizer(4, 8)}, disentangle=0.1),
    "multiscale": lambda: MultiScaleVectorQuantizer(4, 16, (1, 2, 3), convs=2),
    "multiscale-cosine": lambda: MultiScaleVectorQuantizer(
        4, 16, (1, 2, 3), convs=0, metric="cosine", scale_dropout=0.5
    ),
}


def build(name: str) -> Quantizer:
    """The instance, its codebook spread out so that codes differ."""
    torch.manual_seed(0)
    quantizer = DISCRETE[name]()
    with torch.no_grad():
        for key, tensor in list(quantizer.named_parameters()) + list(quantizer.named_buffers()):
            if key.endswith(("codebook", "sums")) and tensor.shape[-1] == 4:
                tensor.copy_(torch.randn(tensor.shape))
    return quantizer


def latent(quantizer: Quantizer, batch: int = 3, seed: int = 1) -> torch.Tensor:
    """A standard normal latent (batch, POSITIONS, dim)."""
    return torch.randn(batch, POSITIONS, quantizer.dim, generator=torch.Generator().manual_seed(seed))
