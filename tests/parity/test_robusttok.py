"""RobustTok against its authors' numbers."""

from tests.parity.cases import Case, assert_close, parametrize
from vistok.losses import dino
from vistok.losses.augment import diff_augment, fading_blur


@parametrize("robusttok", kinds=("dino-disc",))
def test_discriminator(case: Case) -> None:
    io, config = case.io, case.config
    judge = dino.DinoDiscriminator(
        weights="random",
        image=config["frozen_input"],
        patch=config["patch"],
        vit_width=config["embed_dim"],
        depth=config["depth"],
        heads=config["heads"],
        taps=config["key_depths"],
        kernel=config["kernel"],
        range=(-1, 1),
    ).eval()
    theirs = case.weights
    judge.vit.load({key[5:]: value for key, value in theirs.items() if key.startswith("dino.")})
    heads = {key: value for key, value in theirs.items() if key.startswith("heads.")}
    judge.load_state_dict(dino.head_keys().to_ours(heads))
    pixels = ((io["image"] + 1) / 2).requires_grad_()
    logits = judge(pixels)
    assert_close(logits, io["logits"], name="logits")
    for depth, found in enumerate(judge.features(io["image"])):
        assert_close(found[:, :, : io[f"act{depth}_first8"].shape[-1]], io[f"act{depth}_first8"], name=f"depth {depth}")
    (-logits.mean()).backward()
    assert_close(pixels.grad / 2, io["grad_image_of_neg_mean"], name="gradient")  # of pixels in [0, 1]: twice as steep
    augmented = diff_augment(
        io["image"], config["aug_prob"], config["cutout"], groups=io["aug_uniform_flags"], draws=io["aug_uniforms"]
    )
    assert_close(augmented, io["augmented"], name="augmented")
    assert_close(fading_blur(io["image"], 0.25), io["blurred_0_25"], name="blurred")
