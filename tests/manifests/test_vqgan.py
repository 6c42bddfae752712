"""The published VQGANs at full size: every key has its place, and the sizes are recognised from shapes alone."""

import pytest
import torch

from tests.manifests.manifest import check, names, shapes
from vistok.tokenizers.vqgan import VARIANTS, recognise

MANIFESTS = {
    "taming-imagenet-f16-1024": ("vqgan-imagenet-f16-1024",),
    "taming-imagenet-f16-16384": ("vqgan-imagenet-f16-16384",),
    "taming-openimages-f8-256": ("vqgan-openimages-f8-256",),
    "taming-openimages-f8-16384": ("vqgan-openimages-f8-16384",),
    "maskgit-vqgan-imagenet-f16-256": ("vqgan-maskgit-f16",),
    "llamagen-vq-16": ("vqgan-llamagen-f16", "vqgan-llamagen-f16-t2i"),
    "llamagen-vq-8": ("vqgan-llamagen-f8",),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_has_its_place(name):
    state = shapes("vqgan", name)
    for variant in MANIFESTS[name]:
        check("vqgan", variant, state)
        assert recognise(state) == VARIANTS[variant]


def test_no_manifest_is_forgotten():
    assert set(names("vqgan")) <= set(MANIFESTS)


def test_judges_of_real_taming_checkpoints_are_dropped():
    from vistok.tokenizers.vqgan import key_table

    state = shapes("vqgan", "taming-imagenet-f16-1024")
    extra = {"loss.perceptual_loss.lin0.model.1.weight": torch.empty(1, device="meta")}
    table = key_table(VARIANTS["vqgan-imagenet-f16-1024"])
    assert table.to_ours(state | extra).keys() == table.to_ours(state).keys()
