"""The published OmniTokenizers at full size: every key has its place, sizes are told from shapes."""

from dataclasses import replace

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.generators.omnitokenizer import VARIANTS as LMS
from vistok.generators.omnitokenizer import recognise as recognise_lm
from vistok.losses.discriminators import build_discriminator
from vistok.losses.patchgan import omnitokenizer_keys
from vistok.tokenizers.omnitokenizer import VARIANTS, recognise

MANIFESTS = {
    "tokenizer-joint-vq": "omnitokenizer-imagenet-k600",
    "tokenizer-joint-vae": "omnitokenizer-imagenet-k600-vae",
    "tokenizer-image-only": "omnitokenizer-imagenet-only",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_has_its_place(name):
    state, variant = shapes("omnitokenizer", name), MANIFESTS[name]
    check("omnitokenizer", variant, state, role="tokenizer")
    assert recognise(state) == replace(VARIANTS[variant], biased=False)  # which cannot be seen


def test_discriminators():
    state = shapes("omnitokenizer", "discriminators")
    for kind in ("image", "video"):
        prefix = f"{kind}_discriminator."
        theirs = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        ours = omnitokenizer_keys().to_ours(theirs)
        wanted = build_discriminator(f"omnitokenizer-{kind}").state_dict()
        assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in wanted.items()}


def test_language_model():
    state = shapes("omnitokenizer", "lm-imagenet")
    check("omnitokenizer", "omnitokenizer-lm-imagenet", state, role="generator")
    assert recognise_lm(state) == LMS["omnitokenizer-lm-imagenet"]


def test_no_manifest_is_forgotten():
    assert set(names("omnitokenizer")) <= {*MANIFESTS, "discriminators", "lm-imagenet"}
