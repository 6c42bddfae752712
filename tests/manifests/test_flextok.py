"""The published FlexToks: every key has its place, sizes are told from shapes, and from the authors' configuration."""

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.errors import ConfigError
from vistok.tokenizers.flextok import VARIANTS, configure, recognise

pytest.importorskip("diffusers")
PUBLISHED = {"d12-d12": "flextok-d12-d12", "d18-d18": "flextok-d18-d18", "d18-d28": "flextok-d18-d28"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_has_its_place(name):
    state, variant = shapes("flextok", name), PUBLISHED[name]
    check("flextok", variant, state)
    assert recognise(state) == VARIANTS[variant]


def test_no_manifest_is_forgotten():
    assert set(names("flextok")) <= set(PUBLISHED)


def tree(encoder=12, decoder=12, scale=0.5):
    """The authors' configuration, as far as it is read."""

    def trunk(depth):
        return {"_target_": "flextok.model.trunks.transformers.FlexTransformer", "dim": 64 * depth, "depth": depth}

    return {
        "_target_": "flextok.flextok_wrapper.FlexTok",
        "vae": {"_target_": "flextok.vae_wrapper.StableDiffusionVAE", "latent_channels": 16, "scaling_factor": scale},
        "encoder": {
            "module_dict": {
                "enc_patch_emb": {"patch_sizes": [2, 2]},
                "enc_posemb_module": {"max_sizes": [16, 16]},
                "enc_register_module": {"n_min": 256, "n_max": 256},
                "enc_transformer": trunk(encoder),
            }
        },
        "decoder": {
            "module_dict": {"dec_transformer": trunk(decoder), "dec_to_patches": {"adaLN_emb_read_key": "dec_time_emb"}}
        },
        "regularizer": {"levels": [8, 8, 8, 5, 5, 5]},
    }


def test_the_authors_configuration_tells_what_shapes_cannot():
    told = configure(tree(12, 12, 0.5))
    assert told.vae is not None
    assert told.vae.scale == 0.5
    assert (told.encoder, told.decoder) == (VARIANTS["flextok-d12-d12"].encoder, VARIANTS["flextok-d12-d12"].decoder)
    assert (told.size, told.grid, told.levels) == ((256, 256), (16, 16), (8, 8, 8, 5, 5, 5))
    with pytest.raises(ConfigError, match="FlexTok"):
        configure({"model": {}})
