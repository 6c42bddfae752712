"""MaskBit's, VQGAN+'s and MaskGIT's published models: every key has its place, sizes are told from shapes."""

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.generators import maskgit as generators
from vistok.tokenizers.maskgit import VARIANTS, recognise

TOKENIZERS = (
    *(f"maskbit-tokenizer-{bits}bit" for bits in (10, 12, 14, 16, 18)),
    "vqgan-plus-12bit",
    "maskgit-tokenizer",
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_key_has_its_place(name):
    state = shapes("maskgit", name)
    check("maskgit", name, state, "tokenizer")
    assert recognise(state) == VARIANTS[name]


def test_vqgan_plus_of_ten_bits_differs_in_its_codebook_alone():
    """It has no manifest of its own."""
    import torch

    state = dict(shapes("maskgit", "vqgan-plus-12bit"))
    for key, shape in {
        "quantize.embedding.weight": (1024, 256),
        "encoder.conv_out.weight": (256, 512, 1, 1),
        "encoder.conv_out.bias": (256,),
        "decoder.conv_in.weight": (512, 256, 3, 3),
    }.items():
        state[key] = torch.empty(shape, device="meta")
    check("maskgit", "vqgan-plus-10bit", state, "tokenizer")


@pytest.mark.parametrize("bits", [10, 12, 14, 16, 18])
def test_every_key_of_the_generators_has_its_place(bits):
    state, variant = shapes("maskgit", f"maskbit-generator-{bits}bit"), f"maskbit-{bits}bit"
    check("maskgit", variant, state, "generator")
    assert generators.recognise(state) == generators.VARIANTS[variant]


def test_no_manifest_is_forgotten():
    assert set(names("maskgit")) <= {*TOKENIZERS, *(f"maskbit-generator-{bits}bit" for bits in (10, 12, 14, 16, 18))}
