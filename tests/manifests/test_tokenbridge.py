"""KL-16 and the three sizes of TokenBridge: every key has its place, sizes are told from shapes."""

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.generators import tokenbridge as generator
from vistok.tokenizers import tokenbridge as tokenizer

GENERATORS = {size: f"tokenbridge-generator-{size}" for size in ("base", "large", "huge")}


def test_every_key_of_the_vae_has_its_place():
    state = shapes("tokenbridge", "kl16")
    check("tokenbridge", "tokenbridge-kl16", state, "tokenizer")
    assert tokenizer.recognise(state) == tokenizer.VARIANTS["tokenbridge-kl16"]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_key_of_the_generators_has_its_place(name):
    state, variant = shapes("tokenbridge", name), GENERATORS[name]
    check("tokenbridge", variant, state, "generator")
    assert generator.recognise(state) == generator.VARIANTS[variant]


def test_averaged_weights_have_no_tables():
    state = shapes("tokenbridge", "large")
    bare = {
        key: value for key, value in state.items() if key not in ("channel_mask", "boundaries", "reconstruction_values")
    }
    table = generator.key_table(generator.LARGE)
    assert table.to_ours(bare).keys() == table.to_ours(state).keys()


def test_no_manifest_is_forgotten():
    assert set(names("tokenbridge")) <= {*GENERATORS, "kl16"}
