"""Receipts: a number with all that decided it, so that two numbers can be compared, or it can be said why they differ.

    {"metric": "psnr", "value": 24.1, "protocol": {variant, crop, rounding, samples, reference, ..},
     "model": {"name", "weights"}, "settings": {"tokens": 256, ..}, "environment": {..}}

`compare` subtracts two values of one protocol and refuses others; `explain` says term by term what differs, and what is
known of how much that term can move the value.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vistok.errors import FormatError, MismatchError

VERSION = 1

# What a term of the protocol is worth, as far as it is known; printed by `explain` beside the term.
KNOWN = {
    "variant": "variants of one name are different metrics: SSIM with a range of 2 runs up to 0.1 higher",
    "crop": "other pixels were compared",
    "extractor resize": "the way into the network moves FID in the second decimal, by more where pictures are large",
    "resize": "filters move FID by whole points and PSNR by tenths of a dB",
    "rounding": "cutting off instead of rounding costs up to 0.2 dB on good reconstructions",
    "samples": "Frechet distances fall as samples grow, and are biased below a few times the features' width",
    "reference": "the originals are not the same pictures, or not in the same crop",
    "extractor": "distances in other features share no scale",
    "extractor weights": "the same network with other weights",
    "extractor crop": "the network saw another part of the pictures",
    "captions": "the pictures are scored against other texts",
    "weights": "another checkpoint",
    "tokens": "another prefix length",
}
ORDER = (
    "variant",
    "extractor",
    "extractor weights",
    "extractor resize",
    "crop",
    "resize",
    "rounding",
    "samples",
    "reference",
    "captions",
)


@dataclass(frozen=True)
class Receipt:
    """See the module's docstring. `protocol["variant"]` names the metric's variant; `seed`: None where none is."""

    metric: str
    value: float
    protocol: Mapping[str, Any]
    model: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The metric with its variant."""
        variant = self.protocol.get("variant")
        return f"{self.metric}:{variant}" if variant else self.metric


@dataclass(frozen=True)
class Difference:
    """One term in which two receipts differ. `kind`: protocol, model, settings or environment."""

    kind: str
    term: str
    first: Any
    second: Any

    @property
    def known(self) -> str:
        """What is known of its effect, or nothing."""
        return "another model" if (self.kind, self.term) == ("model", "name") else KNOWN.get(self.term, "")


def differences(a: Receipt, b: Receipt) -> list[Difference]:
    """All terms that differ: the protocol first, by weight, then model, settings, seed and environment."""
    found = []
    for kind in ("protocol", "model", "settings", "environment"):
        first, second = getattr(a, kind), getattr(b, kind)
        terms = [term for term in ORDER if term in first or term in second] if kind == "protocol" else []
        terms += sorted((set(first) | set(second)) - set(terms))
        found += [Difference(kind, t, first.get(t), second.get(t)) for t in terms if first.get(t) != second.get(t)]
        if kind == "settings" and a.seed != b.seed:
            found.append(Difference("settings", "seed", a.seed, b.seed))
    return found


def compare(a: Receipt, b: Receipt) -> float:
    """b's value minus a's. Raises MismatchError where metric or protocol differ, naming every term that does."""
    if a.metric != b.metric:
        raise MismatchError(f"{a.metric} and {b.metric} are not the same metric")
    terms = [one for one in differences(a, b) if one.kind == "protocol"]
    if terms:
        told = "; ".join(f"{one.term}: {one.first!r} and {one.second!r}" for one in terms)
        raise MismatchError(f"these {a.metric} values follow different protocols and cannot be compared: {told}")
    return b.value - a.value


def pairs(a: list[Receipt], b: list[Receipt]) -> Iterator[tuple[Receipt, Receipt]]:
    """Receipts of one metric, and of as many tokens where both have such; those of the longest prefix otherwise."""
    for metric in dict.fromkeys(receipt.metric for receipt in a):
        first = {receipt.settings.get("tokens"): receipt for receipt in a if receipt.metric == metric}
        second = {receipt.settings.get("tokens"): receipt for receipt in b if receipt.metric == metric}
        if not second:
            continue
        shared = [tokens for tokens in first if tokens in second]
        if shared:
            yield from ((first[tokens], second[tokens]) for tokens in shared)
        else:
            yield list(first.values())[-1], list(second.values())[-1]


def plain(receipts: list[Receipt]) -> list[dict[str, Any]]:
    """As JSON values."""
    return [asdict(receipt) for receipt in receipts]


def read(path: Path) -> list[Receipt]:
    """The receipts of a JSON file: one that `vistok eval --json` printed, or any with a list under "receipts".

    Raises FormatError for another kind of file, or one of a newer version.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is no JSON file that can be read: {error}") from error
    if not isinstance(held, dict) or not isinstance(held.get("receipts"), list):
        raise FormatError(f"{path} holds no receipts; `vistok eval --json` prints such a file")
    if int(held.get("receipts_version", VERSION)) > VERSION:
        raise FormatError(f"{path} has receipts of version {held['receipts_version']}, newer than {VERSION}: upgrade")
    try:
        return [Receipt(**one) for one in held["receipts"]]
    except TypeError as error:
        raise FormatError(f"{path}: a receipt is damaged: {error}") from error
