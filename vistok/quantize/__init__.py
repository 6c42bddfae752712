"""Quantizers: continuous latents to codes and back, with the losses that train through the rounding.

Every one takes a latent (B, N, D) and gives a `Quantized` record; `encode` gives the codes alone, and `decode` turns
codes into vectors, exactly. See base.py for the surface, and each file for its paper.
"""

from vistok.quantize.base import Quantized, Quantizer
from vistok.quantize.bsq import BSQ
from vistok.quantize.entropy import EntropyTerm
from vistok.quantize.fsq import FSQ
from vistok.quantize.gaussian import GaussianQuantizer
from vistok.quantize.ibq import IBQ
from vistok.quantize.lfq import LFQ
from vistok.quantize.multiscale import MultiScaleVectorQuantizer
from vistok.quantize.residual import ResidualFSQ, ResidualQuantizer, ResidualVQ
from vistok.quantize.rotation import rotate, straight_through
from vistok.quantize.search import nearest
from vistok.quantize.simvq import SimVQ
from vistok.quantize.vq import VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "EntropyTerm",
    "GaussianQuantizer",
    "MultiScaleVectorQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualFSQ",
    "ResidualQuantizer",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantizer",
    "nearest",
    "rotate",
    "straight_through",
]
