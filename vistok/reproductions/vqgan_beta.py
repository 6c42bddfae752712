"""The VQGAN line's second check: beta on the wrong term, as the published models have it, changes little.

    plain     commitment beta, codebook 1: as the papers write it
    legacy    commitment 1, codebook beta: as taming's published weights and MaskGIT's were trained

Everything else is alike: network, codebook, data, batches, squared error, Adam.
"""

from functools import partial

from vistok.evaluation.reproduction import Arm, Condition, Reproduction, ratio
from vistok.reproductions.vqgan import codebook

REPRODUCTION = Reproduction(
    slug="vqgan-beta",
    title="VQGAN: beta on the codebook instead of the commitment",
    claim="which of the quantizer's two terms beta weighs makes no difference that matters to the reconstruction",
    source='arXiv:2012.09841\'s code, where "legacy" keeps the slip because the published weights were trained with it',
    checked="CIFAR-10, 64 codes of 8 numbers a picture, squared error without perceptual and adversarial terms, one "
    "short length of training. Usage is a report, not part of the rule",
    baseline="plain",
    arms={
        "legacy": Arm("commitment 1, codebook 0.25", partial(codebook, dim=8, kind="legacy"), 3),
        "plain": Arm("commitment 0.25, codebook 1", partial(codebook, dim=8, kind="plain"), 3),
    },
    rule=(
        Condition("test error, legacy over plain", ratio("mse", "legacy", over="plain"), at_least=0.97, at_most=1.03),
    ),
    steps=300,
    batch=32,
    report=("mse", "usage", "perplexity"),
)
