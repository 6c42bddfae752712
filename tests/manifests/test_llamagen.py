"""The published LlamaGens at full size: every key has its place, sizes are told from shapes."""

from dataclasses import replace

import pytest
import torch

from tests.manifests.manifest import check, names, shapes
from vistok.generators.llamagen import GRID_24, VARIANTS, key_table, recognise

PUBLISHED = {
    "c2i_B_256": "llamagen-b",
    "c2i_L_384": "llamagen-l-384",
    "c2i_XL_384": "llamagen-xl-384",
    "c2i_XXL_384": "llamagen-xxl-384",
    "c2i_3B_384": "llamagen-3b-384",
    "t2i_XL": "llamagen-t2i-xl",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_has_its_place(name):
    state, variant = shapes("llamagen", name), PUBLISHED[name]
    check("llamagen", variant, state)
    seen = recognise(state)
    if variant == "llamagen-l-384":  # the same shapes as at 256 pixels, which is what is taken
        assert seen == VARIANTS["llamagen-l"]
        seen = replace(seen, segments=GRID_24, size=384)
    assert seen == VARIANTS[variant]


@pytest.mark.parametrize(("name", "variant"), [("c2i_L_384", "llamagen-l-384"), ("c2i_B_256", "llamagen-b")])
def test_a_table_of_the_rotation_tells_the_grid(name, variant):
    state, config = shapes("llamagen", name), VARIANTS[variant]
    positions = 1 + config.segments[0].count
    state["freqs_cis"] = torch.empty(positions, config.trunk.head // 2, 2, device="meta")
    assert recognise(state) == config
    assert "freqs_cis" not in key_table(config).to_ours(state)


def test_no_manifest_is_forgotten():
    assert set(names("llamagen")) <= set(PUBLISHED)
