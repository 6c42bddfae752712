"""How much of a text is left after a picture was rebuilt: matches and edit distances of what a reader reads.

    read text, true text -> match, normalised edit distance (TokBench, arXiv:2505.18142)
                         -> character and word error rates over a corpus (VTBench, arXiv:2505.13439, and true ones)

Edit distances are Levenshtein's, in code points, or in words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vistok.extras import import_extra


@dataclass(frozen=True)
class Reading:
    """One read word against the true one: whether they match, and the edit distance over the longer one's length.

    `raw` compares them as they are, `caseless` in lower case, `anyascii` transliterated to ASCII, `unicase` that in
    lower case. The distance of transliterated words is over the lengths of the words as they are, as TokBench has it,
    and may be above 1.
    """

    raw: bool
    caseless: bool
    anyascii: bool
    unicase: bool
    raw_ned: float
    caseless_ned: float
    unicase_ned: float


def reading(true: str, read: str) -> Reading:
    """Compare one word that was read with the true one."""
    transliterate = import_extra("anyascii", "bench").anyascii
    pairs = {"raw": (true, read), "caseless": (true.lower(), read.lower())}
    pairs["anyascii"] = (transliterate(true), transliterate(read))
    pairs["unicase"] = (pairs["anyascii"][0].lower(), pairs["anyascii"][1].lower())
    longer = max(len(true), len(read))
    found: dict[str, Any] = {name: one == other for name, (one, other) in pairs.items()}
    for name in ("raw", "caseless", "unicase"):
        found[f"{name}_ned"] = edit_distance(*pairs[name]) / longer if longer else 0.0
    return Reading(**found)


def edit_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions, of characters or of words."""
    return import_extra("rapidfuzz.distance.Levenshtein", "bench").distance(first, second)


@dataclass(frozen=True)
class ErrorRate:
    """Errors over a corpus: all of them over all lengths, not a mean of rates. NaN where nothing was to be read."""

    errors: int
    length: int

    @property
    def value(self) -> float:
        """errors / length."""
        return self.errors / self.length if self.length else float("nan")


def character_error_rate(pairs: Iterable[tuple[str, str]]) -> ErrorRate:
    """CER of pairs (true, read): edit distances in characters over the number of true characters."""
    return _rate((edit_distance(true, read), len(true)) for true, read in pairs)


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> ErrorRate:
    """WER of pairs (true, read): edit distances in words over the number of true words."""
    return _rate((edit_distance(true.split(), read.split()), len(true.split())) for true, read in pairs)


def vtbench_word_error_rate(pairs: Iterable[tuple[str, str]]) -> ErrorRate:
    """What VTBench's released script prints as WER: edits in characters over the number of true words.

    About five times a word error rate, and comparable with that script's numbers alone.
    """
    spaced = ((" ".join(true.split()), " ".join(read.split())) for true, read in pairs)
    return _rate((edit_distance(true, read), len(true.split())) for true, read in spaced)


def _rate(counts: Iterable[tuple[int, int]]) -> ErrorRate:
    found = list(counts)
    return ErrorRate(sum(errors for errors, _ in found), sum(length for _, length in found))
