"""The published TiTok and TA-TiTok models at full size: every key has its place, sizes are told from shapes."""

from dataclasses import replace

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.generators import titok as generator
from vistok.tokenizers.titok import VARIANTS, recognise

MANIFESTS = {
    "tokenizer-l32": "titok-l-32",
    "tokenizer-b64": "titok-b-64",
    "tokenizer-s128": "titok-s-128",
    "tokenizer-bl64_vq8k": "titok-bl-64-vq8k",
    "tokenizer-bl128_vq8k": "titok-bl-128-vq8k",
    "tokenizer-sl256_vq8k": "titok-sl-256-vq8k",
    "tokenizer-ll32_vae_c16": "titok-ll-32-vae",
    "tokenizer-bl64_vae_c16": "titok-bl-64-vae",
    "tokenizer-bl128_vae_c16": "titok-bl-128-vae",
    "tatitok_bl32_vq": "ta-titok-bl-32-vq",
    "tatitok_bl64_vq": "ta-titok-bl-64-vq",
    "tatitok_bl128_vq": "ta-titok-bl-128-vq",
    "tatitok_bl32_vae": "ta-titok-bl-32-vae",
    "tatitok_bl64_vae": "ta-titok-bl-64-vae",
    "tatitok_sl128_vae": "ta-titok-sl-128-vae",
}

GENERATORS = {
    "generator-l32": "titok-generator-l-32",
    "generator-b64": "titok-generator-b-64",
    "generator-s128": "titok-generator-s-128",
    "maskgen_vq_l": "maskgen-vq-l",
    "maskgen_vq_xl": "maskgen-vq-xl",
    "maskgen_kl_l": "maskgen-kl-l",
    "maskgen_kl_xl": "maskgen-kl-xl",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_has_its_place(name):
    state, variant = shapes("titok", name), MANIFESTS[name]
    check("titok", variant, state, "tokenizer")
    seen = recognise(state)
    # a KL model has no codebook, so its sizes cannot be seen and do not matter
    expected = VARIANTS[variant]
    if expected.latent == "kl":
        expected = replace(expected, codebook_size=seen.codebook_size)
    assert seen == expected


@pytest.mark.parametrize("name", GENERATORS)
def test_every_key_of_the_generators_has_its_place(name):
    state, variant = shapes("titok", name), GENERATORS[name]
    check("titok", variant, state, "generator")
    assert generator.recognise(state) == generator.VARIANTS[variant]
    assert recognise(state) is None


def test_no_manifest_is_forgotten():
    assert set(names("titok")) <= {*MANIFESTS, *GENERATORS}
