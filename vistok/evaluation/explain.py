"""Why two numbers differ: the terms in which their receipts differ, and, on data, what each of them is worth.

    receipts A, B --differences--> terms --ladder: A's protocol with one term after another taken from B's--> shares

The ladder measures one tokenizer on one set of pictures, so that what it shows is the protocol's doing alone.
"""

from dataclasses import dataclass, replace

from vistok.data.items import Source
from vistok.data.sources import Where
from vistok.errors import InputError
from vistok.evaluation.protocols import PROTOCOLS, Protocol
from vistok.evaluation.receipt import Difference, Receipt, differences, pairs
from vistok.evaluation.reconstruction import evaluate
from vistok.tokenizer import Tokenizer

STEPS = ("crop", "rounding", "ssim")  # of a protocol, in the order in which a picture meets them


@dataclass(frozen=True)
class Explanation:
    """Two receipts of one metric and the terms in which they differ."""

    first: Receipt
    second: Receipt
    terms: list[Difference]

    @property
    def gap(self) -> float:
        """The second value minus the first."""
        return self.second.value - self.first.value

    @property
    def comparable(self) -> bool:
        """Whether the protocol is the same, so that the gap is the models'."""
        return all(term.kind != "protocol" for term in self.terms)


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: the term that changed, to what, and the value of each metric after it."""

    term: str
    value: str
    values: dict[str, float]


def explain(a: list[Receipt], b: list[Receipt]) -> list[Explanation]:
    """Every metric that both lists have. Raises InputError where they share none."""
    found = [Explanation(first, second, differences(first, second)) for first, second in pairs(a, b)]
    if not found:
        names = [sorted({receipt.metric for receipt in part}) for part in (a, b)]
        raise InputError(f"no metric in common: {', '.join(names[0])} and {', '.join(names[1])}")
    return found


def ladder(
    tokenizer: Tokenizer, data: Source | Where, first: Protocol, second: Protocol, *, size: int | None = None
) -> list[Rung]:
    """The numbers of `tokenizer` on `data` from the first protocol to the second, one term at a time."""
    rungs = [_rung(tokenizer, data, first, size, "", first.name)]
    here = first
    for term in STEPS:
        if getattr(here, term) != getattr(second, term):
            here = replace(here, **{term: getattr(second, term)})
            rungs.append(_rung(tokenizer, data, here, size, term, getattr(second, term)))
    return rungs


def named_protocol(receipts: list[Receipt]) -> Protocol | None:
    """The protocol that receipts name, where it is one of `PROTOCOLS`."""
    return PROTOCOLS.get(str(receipts[0].protocol.get("name"))) if receipts else None


def _rung(
    tokenizer: Tokenizer, data: Source | Where, protocol: Protocol, size: int | None, term: str, told: str
) -> Rung:
    row = evaluate(tokenizer, data, size=size, protocol=protocol).prefixes[-1]
    values = {"psnr": row.psnr, "ssim": row.ssim} | ({} if row.ms_ssim is None else {"ms_ssim": row.ms_ssim})
    return Rung(term, told, values)
