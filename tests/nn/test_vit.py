"""The plain ViT: what is left out is not needed, and other sizes are resampled."""

import pytest
import torch

from vistok.errors import ConfigError
from vistok.nn.vit import ViT, ViTConfig, fitted, recognise_vit, vit_keys

SMALL = ViTConfig(32, 8, 64, 3, 2, layer_scale=0.5)


def build(config=SMALL, **options):
    torch.manual_seed(0)
    return ViT(config, **options)


def test_only_wanted_tokens_are_computed():
    vit, x = build(), torch.randn(2, 30, 64)
    whole = vit.run(x)
    torch.testing.assert_close(vit.run(x, first=7), whole[:, :7])
    torch.testing.assert_close(vit.run(x, last=5), whole[:, -5:])
    assert vit(torch.rand(2, 3, 32, 32)).shape == (2, 17, 64)
    with pytest.raises(ConfigError, match="tile"):
        ViTConfig(30, 8)


def test_skipped_branches_keep_the_mean_and_act_in_training_alone():
    vit, x = build(drop_path=0.5), torch.randn(1, 6, 64).expand(4000, -1, -1)
    still = vit.eval().run(x[:1])
    assert torch.equal(vit.run(x[:1]), still)
    block = vit.blocks[-1].train()
    assert [b.skip for b in vit.blocks] == [0.0, 0.25, 0.5]
    torch.manual_seed(0)
    with torch.no_grad():
        moved = block(x[:, :1]) - x[:, :1]
        assert len(moved.flatten(1).unique(dim=0)) >= 3  # neither, one or both branches


def test_state_dicts_in_timms_names():
    vit = build()
    theirs = vit_keys().to_theirs(vit.state_dict())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.2.ls1.gamma", "norm.bias"} <= set(theirs)
    seen = recognise_vit(theirs, heads=2)
    assert (seen.image, seen.patch, seen.width, seen.depth, seen.heads) == (32, 8, 64, 3, 2)
    assert recognise_vit({"x": torch.ones(1)}) is None


def test_positions_and_kernels_are_resampled():
    vit = build()
    same = fitted(vit.state_dict(), SMALL)
    assert all(torch.equal(same[key], value) for key, value in vit.state_dict().items())
    larger = ViTConfig(96, 16, 64, 3, 2, layer_scale=0.5)
    state = fitted(vit.state_dict(), larger)
    other = ViT(larger)
    other.load_state_dict(state)
    small = torch.rand(1, 3, 8, 8)
    large = torch.nn.functional.interpolate(small, size=(16, 16), mode="bicubic", antialias=True)
    seen = vit.patch(small).flatten()
    torch.testing.assert_close(other.patch(large).flatten(), seen, atol=1e-5, rtol=1e-4)
