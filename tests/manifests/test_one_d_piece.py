"""The published One-D-Piece tokenizers at full size: every key has its place, sizes are told from shapes."""

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.tokenizers.one_d_piece import VARIANTS, recognise

MANIFESTS = {f"tokenizer-{size}256": f"one-d-piece-{size}-256" for size in "lbs"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_has_its_place(name):
    state, variant = shapes("one-d-piece", name), MANIFESTS[name]
    check("one-d-piece", variant, state)
    assert recognise(state) == VARIANTS[variant]


def test_no_manifest_of_a_tokenizer_is_forgotten():
    assert set(names("one-d-piece", "tokenizer-")) <= set(MANIFESTS)
