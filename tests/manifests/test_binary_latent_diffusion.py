"""The published binary autoencoders and sampler: every key has its place, sizes are told from shapes."""

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.generators import binary_latent_diffusion as generator
from vistok.tokenizers import binary_latent_diffusion as tokenizer

AUTOENCODERS = {f"ae-{bits}": f"binary-latent-diffusion-{bits}" for bits in ("c64", "c128")}
SAMPLERS = {"sampler-c64": "binary-latent-diffusion-generator-c64"}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_key_has_its_place(name):
    training, variant = shapes("binary-latent-diffusion", name), AUTOENCODERS[name]
    assert all(key.startswith("ae.") for key in training)
    state = {key.removeprefix("ae."): value for key, value in training.items()}
    check("binary-latent-diffusion", variant, state, "tokenizer")
    assert tokenizer.recognise(state) == tokenizer.VARIANTS[variant]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_key_of_the_sampler_has_its_place(name):
    state, variant = shapes("binary-latent-diffusion", name), SAMPLERS[name]
    check("binary-latent-diffusion", variant, state, "generator")
    assert generator.recognise(state) == generator.VARIANTS[variant]


def test_no_manifest_is_forgotten():
    assert set(names("binary-latent-diffusion")) <= set(AUTOENCODERS) | set(SAMPLERS)
