"""The published FQGANs and the full-size FAR models: every key has its place, sizes are told from shapes."""

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.tokenizers.fqgan import VARIANTS, recognise

TOKENIZERS = {name: f"fqgan-{name}" for name in ("dual-ds16", "triple-ds16", "dual-ds8", "triple-ds8")}
GENERATORS = {f"far-{kind}-{size}": f"fqgan-far-{kind}-{size.lower()}" for kind in ("dual", "triple") for size in "BL"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_key_has_its_place(name):
    state, variant = shapes("fqgan", name), TOKENIZERS[name]
    check("fqgan", variant, state, "tokenizer")
    assert recognise(state) == VARIANTS[variant]


def test_prediction_heads_may_be_dropped():
    state = shapes("fqgan", "dual-ds16")
    bare = {key: value for key, value in state.items() if not key.startswith("feat_pred_head.")}
    seen = recognise(bare)
    assert seen is not None
    assert seen.features == ()


@pytest.mark.parametrize("name", GENERATORS)
def test_every_key_of_the_generators_has_its_place(name):
    from vistok.generators import fqgan

    state, variant = shapes("fqgan", name), GENERATORS[name]
    check("fqgan", variant, state, "generator")
    assert fqgan.recognise(state) == fqgan.VARIANTS[variant]


def test_no_manifest_is_forgotten():
    assert set(names("fqgan")) <= set(TOKENIZERS) | set(GENERATORS)
