"""HiMTok beside a language model: mask tokens as words of its vocabulary, and the losses that train it to write them.

    input ids (B, L) with placeholders  + masks -> ids with the masks' own codes             `place_codes`
    logits (B, L - 1, V), labels (B, L - 1)     -> soft tokens (B, N, K), valid (B,)         `soft_tokens`
    soft tokens                                 -> mask probabilities (B, S, S)              `HiMTok.soft_decode`
    those and target masks                      -> cross-entropy + 0.25 dice                 `mask_loss`
    a random prefix and a blurred target        -> the hierarchical term                     `hierarchical_loss`

Positions are shifted as language models have them: logits at t predict labels[:, t]. A row without the start token, or
with fewer than N positions after it, is not valid: it stays out of the losses. Source: arXiv:2503.13026, section 3.3.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import ConfigError, FormatError, InputError
from vistok.losses.segmentation import binary_cross_entropy, blur, dice
from vistok.tokenizers.himtok import HiMTok

DICE = 0.25  # weight of dice beside the cross-entropy
SOFTNESS = 2.0  # of the softmax over mask ids
PREFIXES = 3  # lengths drawn for the hierarchical term; its weight too
BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
GRID = 1000  # boxes in text count in thousandths of the picture


@dataclass(frozen=True)
class MaskWords:
    """Where mask tokens lie in a language model's vocabulary: ids of start and end, and of code 0; codes follow on."""

    start: int
    end: int
    first: int
    codes: int = 1024
    length: int = 32

    def __post_init__(self) -> None:
        if any(self.first <= one < self.first + self.codes for one in (self.start, self.end)) or self.length < 1:
            raise ConfigError(f"start and end must lie outside of the ids of the codes, and length be positive: {self}")

    def slots(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, N) of the mask tokens after the first start in ids (B, L), and which rows have them all (B,).

        Rows that have not give position 0.
        """
        started = ids == self.start
        begin = started.int().argmax(1) + 1
        valid = started.any(1) & (begin + self.length <= ids.shape[1])
        steps = torch.arange(self.length, device=ids.device)
        return torch.where(valid[:, None], begin[:, None] + steps, 0), valid


def place_codes(ids: Tensor, codes: Tensor, words: MaskWords) -> Tensor:
    """Ids or labels (B, L) with the `codes` (B, N) of a mask written over the N places after the start token.

    Raises InputError for a row without the places.
    """
    slots, valid = words.slots(ids)
    if not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        raise InputError(f"row {row} has no start token {words.start} with {words.length} places behind it")
    return ids.scatter(1, slots, codes.to(ids) + words.first)


def soft_tokens(logits: Tensor, labels: Tensor, words: MaskWords) -> tuple[Tensor, Tensor]:
    """softmax(2 logits) over the codes at the N places that follow the start in `labels`: (B, N, K), and valid (B,).

    `logits` (B, L, V) predict `labels` (B, L) position by position. Rows that are not valid hold zeros.
    """
    slots, valid = words.slots(labels)
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    chosen = logits[rows, slots, words.first : words.first + words.codes]
    return (SOFTNESS * chosen).softmax(-1) * valid[:, None, None], valid


def mask_loss(found: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy + 0.25 dice of probabilities (B, S, S) and targets, over the rows that are `valid` (B,)."""
    if valid is not None:
        if not bool(valid.any()):
            return found.sum() * 0
        found, target = found[valid], target[valid]
    return binary_cross_entropy(found, target) + DICE * dice(found, target)


def draw_prefixes(tokens: int, rng: torch.Generator) -> list[int]:
    """Three lengths k = j - 1 of `tokens` j in 0..N-1, without replacement, j with a probability like 1 / (j + 9)."""
    weights = 1 / (torch.arange(tokens, device=rng.device) + 9.0)
    return [int(j) - 1 for j in torch.multinomial(weights, PREFIXES, generator=rng)]


def shortened(soft: Tensor, length: int) -> Tensor:
    """Soft tokens (B, N, K), zero from `length` on; -1 keeps all but the last, as the authors' indexing has it."""
    kept = soft.clone()
    kept[:, length:] = 0
    return kept


def blurred_target(mask: Tensor, length: int) -> Tensor:
    """What a prefix of `length` tokens should show of masks (B, S, S): sigma = 100 / (length + 2) - 2 pixels."""
    sigma = 100 / (length + 2) - 2
    return blur(mask, sigma) if sigma > 0 else mask.float()


def hierarchical_loss(
    tokenizer: HiMTok, soft: Tensor, target: Tensor, lengths: list[int], valid: Tensor | None = None
) -> Tensor:
    """3 (cross-entropy + 0.25 dice) of what the last of `lengths` shows, against the blurred target (B, S, S).

    The paper speaks of all the lengths drawn; the released code, and so this, uses the last of them alone.
    """
    length = lengths[-1]
    found = tokenizer.soft_decode(shortened(soft, length))
    return PREFIXES * mask_loss(found, blurred_target(target, length), valid)


# -- boxes in text ---------------------------------------------------------------------------------------------------


def box_text(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """A box (left, top, right, bottom) in pixels of a picture (height, width) as `<box>[[x1, y1, x2, y2]]</box>`."""
    height, width = size
    scaled = [round(GRID * value / side) for value, side in zip(box, (width, height, width, height), strict=True)]
    if min(scaled) < 0 or max(scaled) > GRID:
        raise InputError(f"box {box} leaves the picture of {height}x{width}")
    return f"<box>[{scaled}]</box>"


def read_box(text: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The first box of a model's answer, in pixels. Raises FormatError where there is none."""
    found = BOX.search(text)
    if found is None:
        raise FormatError(f"no box [[x1, y1, x2, y2]] in {text[:80]!r}")
    height, width = size
    left, top, right, bottom = (int(value) / GRID for value in found.groups())
    return left * width, top * height, right * width, bottom * height
