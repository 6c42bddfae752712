"""The generators' contract on a small one: conditions, seeds, known tokens, and whose tokens they are."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from tests.toy import Toy, ToyConfig
from vistok.errors import ConfigError, InputError, MismatchError
from vistok.generator import Generator, known_prefix
from vistok.sampling.noise import uniforms
from vistok.sampling.tokens import Sampling, draw
from vistok.tokens import Source, Tokens


@dataclass(frozen=True)
class DiceConfig:
    tokenizer: Source | None = None
    version: int = 1


class Dice(Generator):
    """Every code on its own, from a table per class."""

    system = "dice"
    classes = 3
    class_names = ("cat", "dog", "frog")
    sampling = Sampling(top_k=4)

    def __init__(self, config: DiceConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.spec = Toy(ToyConfig(only=((16, 16),))).spec
        self.table = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))

    def sample(self, conditions, *, seeds, sampling, known):
        logits = self.table[conditions if conditions is not None else torch.full((len(seeds),), 3)]
        codes = draw(logits[:, None, None].expand(-1, 16, 3, -1), uniforms(seeds, (16, 3)), sampling)
        if known is not None:
            codes = torch.where(known.present[..., None], known.data, codes)
        return codes


@pytest.fixture
def dice():
    return Dice(DiceConfig())


def test_an_item_does_not_depend_on_its_batch(dice):
    together = dice.generate([2, 0, 1], seed=5)
    assert torch.equal(together.codes[1:2], dice.generate(0, seed=6).codes)
    assert torch.equal(together.codes[1:2], dice.generate(0, seed=[6]).codes)
    assert not torch.equal(dice.generate(0, count=2).codes[0], dice.generate(0, count=2).codes[1])


def test_generated_tokens_decode(dice):
    tok = Toy(ToyConfig(only=((16, 16),)))
    assert tok.decode(dice.generate("dog", count=2)).shape == (2, 3, 16, 16)


def test_names_and_numbers_of_classes(dice):
    assert torch.equal(dice.generate(["dog", 0]).codes, dice.generate([1, 0]).codes)
    with pytest.raises(InputError, match="did you mean 'frog'"):
        dice.generate("froog")
    with pytest.raises(InputError, match=r"0\.\.2"):
        dice.generate(3)
    for wrong in (1.5, True, None, -1):
        with pytest.raises(InputError, match=r"0\.\.2"):
            dice.generate([0, wrong])
    assert torch.equal(dice.generate(torch.tensor([1])).codes, dice.generate(np.int64(1)).codes)
    with pytest.raises(InputError, match="2 conditions, 3 count"):
        dice.generate([0, 1], count=3)


def test_options_are_the_systems_own(dice):
    with pytest.raises(InputError, match="no option 'steps'"):
        dice.generate(0, steps=3)


def test_published_settings_hold_unless_told_otherwise(dice):
    few, all_ = dice.generate(0, count=64).codes, dice.generate(0, count=64, top_k=0).codes
    assert len(few.unique()) <= 4 < len(all_.unique())
    with pytest.raises(InputError, match="temperature"):
        dice.generate(0, temperature=-1)


def test_known_tokens_stay(dice):
    known = dice.generate([0, 1], seed=3)
    keep = torch.zeros(2, 16, dtype=torch.bool)
    keep[:, 5] = True
    masked = Tokens(known.segments, codes=known.codes, keep=keep)
    again = dice.generate([0, 1], seed=9, known=masked)
    assert torch.equal(again.codes[:, 5], known.codes[:, 5])
    assert torch.equal(dice.generate([0, 1], seed=9, known=known.prefix(4)).codes[:, :4], known.codes[:, :4])


def test_known_prefix_says_how_long_it_is(dice):
    tokens = dice.generate([0, 1])
    assert known_prefix(dice._known(tokens.prefix(4), 2), "dice") == 4
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, 3] = False
    with pytest.raises(InputError, match="prefix"):
        known_prefix(dice._known(Tokens(tokens.segments, codes=tokens.codes, keep=keep), 2), "dice")


def test_tokens_of_another_layout_or_model_are_refused(dice):
    other = Toy(ToyConfig(levels=4, only=((16, 16),)))
    with pytest.raises(MismatchError, match="codes of 4"):
        dice.attach(other)
    with pytest.raises(MismatchError, match="not"):
        dice.generate(0, known=other.encode(torch.rand(1, 3, 16, 16)))
    tok = Toy(ToyConfig(only=((16, 16),)))
    dice.attach(tok)
    assert dice.generate(0).source == tok.source == dice.config.tokenizer
    changed = Toy(ToyConfig(only=((16, 16),)))
    changed.encoder.gain.data.fill_(0.5)
    with pytest.raises(MismatchError, match="was made for"):
        dice.attach(changed)
    with pytest.raises(MismatchError, match="were made by"):
        dice.generate(0, known=changed.encode(torch.rand(1, 3, 16, 16)))


def test_a_training_batch_may_hold_codes_tokens_or_pixels(dice):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="attach"):
        dice.batch_tokens({"pixels": pixels})
    tok = Toy(ToyConfig(only=((16, 16),)))
    tokens = dice.attach(tok).tokenizer.encode(pixels)
    for batch in ({"codes": tokens.codes}, {"tokens": tokens}, {"pixels": pixels}):
        assert torch.equal(dice.batch_tokens(batch), tokens.codes)
    with pytest.raises(InputError, match="labels"):
        dice.batch_labels({}, 2)
    assert not any(key.startswith("encoder") for key in dice.state_dict())
    assert copy.deepcopy(dice).tokenizer is tok


def test_the_trainer_gives_it_its_tokenizer(dice):
    tok = Toy(ToyConfig(only=((16, 16),)))
    dice.learn_from({"tokenizer": tok})
    assert dice.tokenizer is tok
    with pytest.raises(ConfigError, match="tokenizer alone"):
        dice.learn_from({"tokenizer": tok, "features": tok})


def test_a_saved_generator_knows_its_tokenizer(dice, tmp_path):
    from vistok.config import from_plain, to_plain

    dice.attach(Toy(ToyConfig(only=((16, 16),))))
    assert from_plain(DiceConfig, to_plain(dice.config)) == dice.config


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("guidance", (-0.1, float("nan"), float("inf"))),
        ("temperature", (-0.1, float("nan"), float("inf"))),
        ("top_k", (-1, 1.5)),
        ("top_p", (0.0, 1.1, float("nan"))),
    ],
)
def test_settings_out_of_range_are_told_by_name(dice, option, values):
    for value in values:
        with pytest.raises(InputError, match=f"{option}=.*expected"):
            dice.generate(0, **{option: value})
