"""Discriminators: what they take and refuse, their shapes, and what they do in training."""

import pytest
import torch

from vistok.errors import ConfigError, InputError, MismatchError, UnknownNameError, VistokError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.augment import diff_augment, fading_blur
from vistok.losses.dino import LocalBatchNorm, as_timm
from vistok.losses.discriminators import DISCRIMINATORS, build_discriminator
from vistok.losses.patchgan import PatchDiscriminator

TINY_DINO = {"weights": "random", "image": 32, "patch": 8, "vit_width": 16, "depth": 2, "heads": 2, "taps": (0, 1)}
OPTIONS = {
    "patchgan": {"width": 8},
    "titok": {"width": 32, "stages": 2},
    "stylegan": {"size": 32, "width": 8, "limit": 16},
    "dino": TINY_DINO,
    "omnitokenizer-image": {"width": 4},
    "omnitokenizer-video": {"width": 4},
    "by-length": {"count": 2, "span": 2, "width": 8},
}
SHAPES = {
    "patchgan": (2, 1, 2, 2),
    "titok": (2, 1, 16, 16),
    "stylegan": (2, 1),
    "dino": (2, 48),
    "omnitokenizer-image": (2, 1, 7, 7),
    "omnitokenizer-video": (2, 1, 4, 7, 7),
    "by-length": (2, 1, 2, 2),
}


def build(name, **more):
    torch.manual_seed(0)
    return build_discriminator(name, **OPTIONS[name], **more)


def pixels_for(name):
    shape = (2, 3, 5, 32, 32) if name.endswith("video") else (2, 3, 32, 32)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_logits_gradients_and_training(name):
    judge, pixels = build(name), pixels_for(name)
    assert judge(pixels).shape == SHAPES[name]
    adversary = AdversarialLoss(judge, adaptive=False)
    optimizer = torch.optim.Adam([p for p in judge.parameters() if p.requires_grad], lr=2e-3)
    fake = pixels.roll(1, -1) * 0.5
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = adversary.discriminator_loss(pixels, fake, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    shown = fake.clone().requires_grad_()
    adversary.generator_loss(shown, shown.mean(), torch.ones(1), 0).backward()
    assert shown.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_state_goes_round(name):
    judge, pixels = build(name), pixels_for(name)
    judge(pixels)
    torch.manual_seed(9)
    again = build_discriminator(name, **OPTIONS[name])
    if name == "dino":
        assert not any(key.startswith("vit") for key in judge.state_dict())
        again.vit.load_weights(judge.vit.weights())
    again.load_state_dict(judge.state_dict())
    assert torch.equal(again.eval()(pixels), judge.eval()(pixels))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("patchgan", (23, 32)),
        ("stylegan", (32, 64)),
        ("dino", (8, 8)),
        ("omnitokenizer-video", (1, 32, 32)),
        ("omnitokenizer-image", (4, 32, 32)),
    ],
)
def test_sizes_that_cannot_be_judged_are_refused(name, size):
    judge = build(name)
    assert not judge.sizes.legal(size)
    with pytest.raises(InputError, match="judges"):
        judge(torch.rand(1, 3, *size))
    assert judge.sizes.legal(tuple(pixels_for(name).shape[2:]))


def test_the_smallest_legal_picture_gives_one_logit():
    for layers in (1, 2, 3, 4):
        judge = PatchDiscriminator(width=4, layers=layers)
        assert judge(torch.rand(2, 3, judge.sizes.minimum, judge.sizes.minimum)).shape == (2, 1, 1, 1)


def test_patch_discriminator_widths_and_norms():
    judge = PatchDiscriminator(width=8, layers=3)
    assert judge(torch.rand(2, 3, 64, 48)).shape == (2, 1, 6, 4)
    assert [m.out_channels for m in judge.main if isinstance(m, torch.nn.Conv2d)] == [8, 16, 32, 64, 1]
    deep = PatchDiscriminator(width=4, layers=5)
    assert [m.out_channels for m in deep.main if isinstance(m, torch.nn.Conv2d)] == [4, 8, 16, 32, 32, 32, 1]
    acting = PatchDiscriminator(width=8, layers=2, norm="act")
    acting(torch.rand(4, 3, 32, 32))
    entering = acting.main[3](acting.main[2](acting.main[1](acting.main[0](torch.rand(4, 3, 32, 32) * 2 - 1))))
    assert entering.mean().abs() < 0.3
    assert 0.7 < entering.std() < 1.3
    for wrong in ({"layers": 0}, {"norm": "none"}, {"range": (1, 0)}, {"augment": 2}):
        with pytest.raises(ConfigError):
            PatchDiscriminator(**wrong)


def test_pixels_are_shifted_to_the_judges_own_range():
    seen = []
    for name, low, high in (("patchgan", -1, 1), ("titok", 0, 1), ("omnitokenizer-image", -0.5, 0.5)):
        judge = build(name)
        judge.register_forward_hook(lambda m, a, o: None)
        judge.logits = lambda x: seen.append(x) or x
        judge(torch.tensor([0.0, 1.0]).repeat(3, 32, 16)[None])
        assert (seen[-1].min().item(), seen[-1].max().item()) == (low, high)
    judge = build("patchgan", range=(0.0, 1.0))
    judge.logits = lambda x: x
    assert torch.equal(judge(pixels_for("patchgan")), pixels_for("patchgan"))


def test_unknown_names_and_options():
    with pytest.raises(UnknownNameError, match="patchgan"):
        build_discriminator("patch-gan")
    with pytest.raises(ConfigError, match="widht"):
        build_discriminator("patchgan", widht=3)
    with pytest.raises(ConfigError, match="power of two"):
        build_discriminator("stylegan", size=48)


def test_stylegan_multipliers_are_texttoks():
    judge = build_discriminator("stylegan", size=32, width=8, multipliers=(1, 2, 4))
    assert [block.conv2.weight.shape[0] for block in judge.blocks] == [16, 32, 32]
    with pytest.raises(ConfigError, match="3 multipliers"):
        build_discriminator("stylegan", size=32, multipliers=(1, 2))


def test_stylegan_judges_a_batch_by_its_variety():
    judge = build("stylegan").eval()
    one = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(judge(torch.cat([one, torch.rand(1, 3, 32, 32)]))[0], judge(torch.cat([one, one]))[0])


# -- DINO ------------------------------------------------------------------------------------------------------------


def test_the_frozen_vit_is_not_trained_nor_saved_and_may_be_given(tmp_path):
    judge = build("dino")
    assert not any(parameter.requires_grad for parameter in judge.vit.parameters())
    assert not judge.train().vit.training
    torch.save({"wrong": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(MismatchError, match="ViT"):
        build_discriminator("dino", weights=tmp_path / "w.pt")
    with pytest.raises(VistokError, match="no file"):
        build_discriminator("dino", weights=tmp_path / "missing.pt")
    torch.save(timm_state(), tmp_path / "dino.pt")
    given = build_discriminator("dino", weights=tmp_path / "dino.pt", taps=(0, 1))
    assert given(torch.rand(2, 3, 32, 32)).shape == (2, 3 * 16)
    bias = given.vit.net.blocks[0].attention.qkv.bias
    assert bias[64:128].abs().sum() == 0  # the keys' bias
    assert bias[:64].abs().sum() > 0


def timm_state():
    g = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, 64), "pos_embed": (1, 17, 64), "patch_embed.proj.weight": (64, 3, 8, 8)}
    shapes |= {"patch_embed.proj.bias": (64,), "norm.weight": (64,), "norm.bias": (64,)}
    for block in range(3):
        inner = {"attn.qkv": (192, 64), "attn.proj": (64, 64), "mlp.fc1": (256, 64), "mlp.fc2": (64, 256)}
        for name, shape in inner.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.weight": (64,), f"blocks.{block}.{name}.bias": (64,)}
    return {key: torch.randn(shape, generator=g) * 0.1 for key, shape in shapes.items()}


def test_transformers_names_are_understood():
    timm = timm_state()
    theirs = {"embeddings.cls_token": timm["cls_token"], "embeddings.position_embeddings": timm["pos_embed"]}
    for part in ("weight", "bias"):
        theirs[f"embeddings.patch_embeddings.projection.{part}"] = timm[f"patch_embed.proj.{part}"]
        theirs[f"layernorm.{part}"] = timm[f"norm.{part}"]
        for block in range(3):
            mine, his = f"blocks.{block}", f"encoder.layer.{block}"
            for name, value in zip(("query", "key", "value"), timm[f"{mine}.attn.qkv.{part}"].chunk(3), strict=True):
                theirs[f"{his}.attention.attention.{name}.{part}"] = value
            for a, b in {
                "attention.output.dense": "attn.proj",
                "intermediate.dense": "mlp.fc1",
                "output.dense": "mlp.fc2",
                "layernorm_before": "norm1",
                "layernorm_after": "norm2",
            }.items():
                theirs[f"{his}.{a}.{part}"] = timm[f"{mine}.{b}.{part}"]
    back = as_timm(theirs)
    assert back.keys() == timm.keys()
    assert all(torch.equal(back[key], timm[key]) for key in timm)


def test_large_pictures_are_cropped_in_training_and_shrunk_in_eval():
    judge, picture = build("dino"), torch.rand(1, 3, 64, 48)
    seen = []
    judge.vit.register_forward_hook(lambda m, a, o: seen.append(a[0]))
    judge.eval()(picture)
    low = (torch.nn.functional.interpolate(picture, size=(32, 32), mode="area") - judge.mean) / judge.deviation
    torch.testing.assert_close(seen[-1], low)
    torch.manual_seed(0)
    judge.train()
    for _ in range(12):
        judge(picture)
    exact = (picture - judge.mean) / judge.deviation
    crops = [any(torch.allclose(x, w[0], atol=1e-5) for w in windows(exact, 32)) for x in seen[1:]]
    assert 0 < sum(crops) < 12


def windows(x, side):
    for top in range(x.shape[2] - side + 1):
        for left in range(x.shape[3] - side + 1):
            yield x[..., top : top + side, left : left + side]


def test_local_batch_norm_takes_every_batch():
    norm = LocalBatchNorm(3, virtual=8)
    x = torch.randn(9, 3, 5)
    y = norm(x)
    assert y.shape == x.shape
    for group in y.unflatten(0, (3, 3)):  # two groups do not divide nine, three do
        torch.testing.assert_close(group.mean((0, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    whole = norm(x[:8])
    torch.testing.assert_close(whole.mean((0, 2)), torch.zeros(3), atol=1e-5, rtol=0)


# -- augmentation ----------------------------------------------------------------------------------------------------


def test_augmentation_acts_in_training_alone():
    judge = build("patchgan", augment=1.0)
    judge.logits = lambda x: x
    pixels = pixels_for("patchgan")
    torch.manual_seed(0)
    assert not torch.equal(judge.train()(pixels), pixels * 2 - 1)
    assert torch.equal(judge.eval()(pixels), pixels * 2 - 1)


def test_augmentation_groups_switch_alone():
    x = torch.rand(2, 3, 16, 16)
    draws = torch.full((7, 2, 1, 1), 0.5)
    never = diff_augment(x, 0.5, groups=torch.full((3,), 0.9), draws=draws)
    assert torch.equal(never, x)
    moved = diff_augment(x, 0.5, groups=torch.tensor([0.1, 0.9, 0.9]), draws=torch.zeros(7, 2, 1, 1))
    assert torch.equal(moved[:, :, 2:, 2:], x[:, :, :-2, :-2])
    assert moved[:, :, :2].abs().sum() == 0
    same = diff_augment(x, 0.5, groups=torch.tensor([0.9, 0.1, 0.9]), draws=draws)
    torch.testing.assert_close(same, x)  # half of each draw: nothing changes
    hole = diff_augment(x, 0.5, 0.25, groups=torch.tensor([0.9, 0.9, 0.1]), draws=draws)
    assert (hole == 0).sum() == 2 * 3 * 16


def test_fading_blur():
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(fading_blur(x, 0.0), x)
    soft = fading_blur(x, 0.5)
    assert soft.std() < 0.5 * x.std()
    torch.testing.assert_close(fading_blur(torch.full_like(x, 0.3), 1.0), torch.full_like(x, 0.3))
