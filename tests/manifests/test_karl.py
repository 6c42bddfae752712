"""The published KARLs: every key has its place, sizes are told from shapes, and from the authors' arguments."""

import pytest
import torch

from tests.manifests.manifest import check, names, shapes
from vistok.errors import ConfigError
from vistok.tokenizers.karl import VARIANTS, configure, key_table, recognise

PUBLISHED = {
    "karl_small-vqgan-quantized": "karl-small",
    "karl_small-vqgan-continuous": "karl-small-in100-continuous",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_has_its_place(name):
    state, variant = shapes("karl", name), PUBLISHED[name]
    check("karl", variant, state)
    assert recognise(state) == VARIANTS[variant]


def test_no_manifest_is_forgotten():
    assert set(names("karl")) <= set(PUBLISHED)


def test_discriminators_of_training_checkpoints_are_dropped():
    state = shapes("karl", "karl_small-vqgan-quantized")
    state["gan_losses.0.perceptual_loss.lin0.model.1.weight"] = torch.empty(1, 64, 1, 1, device="meta")
    assert recognise(state) == VARIANTS["karl-small"]
    assert not any("gan_losses" in key for key in key_table(VARIANTS["karl-small"]).to_ours(state))


def test_the_authors_arguments_tell_the_variant():
    told = configure({"model": "karl_small", "base_tokenizer": "vqgan", "quantize_latent": True, "vq_token_dim": 12})
    assert told == VARIANTS["karl-small"]
    assert configure({"model": "karl_small", "base_tokenizer": "vae"}) == VARIANTS["karl-small-in100-vae-continuous"]
    for plain in ({"model": "karl_huge"}, {"model": "karl_small", "base_tokenizer": "vqvae"}, {}):
        with pytest.raises(ConfigError, match="KARL"):
            configure(plain)
