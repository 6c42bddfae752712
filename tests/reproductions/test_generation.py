"""What reproductions of generators share: tokens on disk, samples in turn, and a judge that tells classes apart."""

import torch

import vistok
from tests.reproductions.test_bits_factors_dimensions import labelled as labelled
from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, of
from vistok.reproductions._generation import (
    Judge,
    drawn,
    encoded,
    judged_samples,
    judgements,
    shared_judge,
    small_tokenizer,
    token_batches,
    trained_judge,
    training_codes,
)


def striped(count, seed):
    """Ten classes that differ in colour and in the direction of a gradient, uint8, and noise over them."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    colour = torch.linspace(0.1, 0.9, 10)[labels][:, None, None, None].expand(-1, 3, 32, 32).clone()
    colour[:, 0] = torch.where(labels % 2 == 0, 0.2, 0.8)[:, None, None]
    noise = 0.05 * torch.randn(count, 3, 32, 32, generator=rng)
    return ((colour + noise).clamp(0, 1) * 255).to(torch.uint8), labels


def test_the_judge_learns_what_tells_classes_apart():
    pixels, labels = striped(200, 0)
    judge = trained_judge(pixels, labels, 30, batch=20, tell=lambda text: None)
    features, classes = judgements(judge, striped(60, 1)[0])
    assert features.shape == (60, 128)
    assert classes.eq(labels[:60]).float().mean() > 0.8
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_batches_go_through_all_tokens_and_keep_their_labels():
    found = {"codes": torch.arange(10)[:, None].expand(-1, 4), "labels": torch.arange(10)}
    batches = token_batches(found, 4, seed=3)
    seen = [next(batches) for _ in range(2)]
    assert all(torch.equal(batch["codes"][:, 0], batch["label"]) for batch in seen)
    assert len({int(one) for batch in seen for one in batch["label"]}) == 8
    again = token_batches(found, 4, seed=3)
    assert torch.equal(next(again)["codes"], seen[0]["codes"])


def test_samples_do_not_depend_on_how_many_are_drawn_at_once():
    torch.manual_seed(0)
    tokenizer = vistok.create("vq-vae-tiny")
    generator = vistok.create("robusttok-rar-tiny", codebook_size=64).attach(tokenizer)
    pixels, labels = drawn(generator, tokenizer, 12, seed=2, at_once=12, temperature=1.0)
    apart, _ = drawn(generator, tokenizer, 12, seed=2, at_once=5, temperature=1.0)
    assert torch.equal(pixels, apart)
    assert labels.tolist() == [*range(10), 0, 1]
    assert pixels.shape == (12, 3, 32, 32)
    assert pixels.dtype == torch.uint8


def test_arms_share_the_tokenizer_the_codes_and_the_judge(labelled, tmp_path):
    plan = Reproduction(
        slug="generation",
        title="",
        claim="",
        source="",
        checked="",
        baseline="one",
        arms={name: Arm("", lambda seed, context: {}, 1) for name in ("one", "two")},
        rule=(Condition("", of("one", "fd")),),
        steps=2,
        batch=8,
        report=(),
    )
    first, second = (Context(plan, labelled, tmp_path, name, 0, None) for name in ("one", "two"))
    tokenizer = small_tokenizer(first, 1, "vq-vae-tiny")
    found = training_codes(first, tokenizer)
    assert found["codes"].shape == (len(labelled.train), 64)
    assert torch.equal(found["codes"][:8], encoded(tokenizer, first.train_pixels(32, 8)[0]))
    assert small_tokenizer(second, 1, "vq-vae-tiny").fingerprint == tokenizer.fingerprint
    judge = shared_judge(first, 2)
    assert isinstance(judge, Judge)
    pixels, labels = second.test_pixels(32, len(labelled.test))
    numbers = judged_samples(pixels, labels, second)
    assert abs(numbers["fd"]) < 1e-6  # the test pictures themselves
    assert numbers["accuracy"] == numbers["real_accuracy"]
    shifted = judged_samples(255 - pixels, labels, second)
    assert shifted["fd"] > 1e-3
