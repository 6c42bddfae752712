"""One-D-Piece's claim at small scale: with a tail dropped in training any prefix decodes, at little cost to the whole.

    tail drop   TiTok with 16 tokens; in training a random number of them, from the end, is missing
    whole       the same without: plain TiTok, whose prefixes the decoder has never seen

Same network, seed and batches.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, difference, of
from vistok.registry import System, register
from vistok.reproductions._rebuilding import rebuilding
from vistok.reproductions._small_titok import CONFIG, RECIPE, scale_to_width
from vistok.tokenizer import Tokenizer
from vistok.tokenizers.one_d_piece import OneDPiece
from vistok.tokenizers.titok import TiTokConfig

LENGTHS = (1, 2, 4, 8, 16)
TESTED, CHANGED = 2000, 400


class Dropped(OneDPiece):
    """One-D-Piece, its first weights scaled to its width."""

    system = "one-d-piece-drop"

    def __init__(self, config: TiTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        scale_to_width(self)


class Whole(Dropped):
    """The same without its tail drop; any prefix may still be given to the decoder."""

    system = "one-d-piece-whole"

    def shorten(self, vectors: Tensor, rng: torch.Generator) -> Tensor:
        return vectors


def weight_of_a_token(tokenizer: Tokenizer, pixels: Tensor, position: int) -> float:
    """Mean absolute change of the picture, in [0, 1], when the code at one position is replaced by a random one."""
    tokens = tokenizer.encode(pixels)
    assert tokens.codes is not None
    codes = tokens.codes.clone()
    rng = torch.Generator().manual_seed(0)
    codes[:, position] = torch.randint(0, CONFIG.codebook_size, (len(codes),), generator=rng)
    return float((tokenizer.decode(replace(tokens, codes=codes)) - tokenizer.decode(tokens)).abs().mean())


def trained(seed: int, context: Context, *, name: str) -> Mapping[str, float]:
    """Train a variant; test it at every length, and how much the first and the last token weigh."""
    model = context.train({"model": {"name": name}, **RECIPE})
    pixels, _ = context.test_pixels(32, TESTED)
    found = rebuilding(model, pixels, LENGTHS)
    rises = [found[f"psnr@{longer}"] - found[f"psnr@{shorter}"] for shorter, longer in pairwise(LENGTHS)]
    first, last = (weight_of_a_token(model, pixels[:CHANGED], position) for position in (0, LENGTHS[-1] - 1))
    return found | {"smallest rise": min(rises), "change@first": first, "change@last": last}


register(System("one-d-piece-drop", Dropped, TiTokConfig, {"one-d-piece-drop": CONFIG}))
register(System("one-d-piece-whole", Whole, TiTokConfig, {"one-d-piece-whole": CONFIG}))

REPRODUCTION = Reproduction(
    slug="one-d-piece",
    title="One-D-Piece: every prefix decodes",
    claim="dropping the tail in training makes every prefix decodable, at little cost at full length",
    source="arXiv:2501.10064, section 3.2",
    checked="CIFAR-10 with 16 tokens of 512 codes, squared error alone, in PSNR. The headline against JPEG and WebP is "
    "not checked: at 32 pixels headers dominate their bytes, and perceptual networks are missing. One length for the "
    "whole batch, as published, makes gradients noisy. The change of the picture when one token becomes random is a "
    "report, not part of the rule",
    baseline="whole",
    arms={
        "tail drop": Arm("tail token drop", partial(trained, name="one-d-piece-drop"), 11),
        "whole": Arm("no drop: TiTok, cut only in the test", partial(trained, name="one-d-piece-whole"), 11),
    },
    rule=(
        Condition("dB gained at every doubling, the least", of("tail drop", "smallest rise"), at_least=0.1),
        Condition("dB over whole at 2 tokens", difference("psnr@2", "tail drop", minus="whole"), at_least=1.5),
        Condition("dB over whole at 4 tokens", difference("psnr@4", "tail drop", minus="whole"), at_least=1.5),
        Condition("dB over whole at 8 tokens", difference("psnr@8", "tail drop", minus="whole"), at_least=0.5),
        Condition("dB over whole at all 16", difference("psnr@16", "tail drop", minus="whole"), at_least=-1.0),
    ),
    steps=2500,
    batch=64,
    report=("psnr@1", "psnr@2", "psnr@4", "psnr@8", "psnr@16", "usage", "change@first", "change@last"),
)
