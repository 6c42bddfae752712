"""Tables of key patterns that turn an authors' state dict into ours, and ours into theirs.

    KeyTable(
        Rename("encoder.down.#.block.#.*", "encoder.levels.#.blocks.#.*"),
        Fuse(("*.q.*", "*.k.*", "*.v.*"), "*.qkv.*"),
        Drop("loss.*"),
    )

`#` stands for a number and `*` for any text; what they match on one side is put in, in order, on the other. The first
rule that matches a key decides. Nothing passes by itself: a key without a rule is left over, which is an error.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vistok.errors import MismatchError

State = Mapping[str, Tensor]
Transform = Callable[[Tensor], Tensor]


def same(tensor: Tensor) -> Tensor:
    """The transform that changes nothing."""
    return tensor


@dataclass(frozen=True)
class Rename:
    """One of theirs is one of ours; `into` changes its layout on the way in, `back` on the way out."""

    theirs: str
    ours: str
    into: Transform = same
    back: Transform = same


@dataclass(frozen=True)
class Fuse:
    """Several of theirs, joined along `dim` after `into`, are one of ours. `sizes` where the parts are not equal."""

    theirs: tuple[str, ...]
    ours: str
    dim: int = 0
    sizes: tuple[int, ...] | None = None
    into: Transform = same
    back: Transform = same


@dataclass(frozen=True)
class Split:
    """One of theirs, after `into`, is several of ours, cut along `dim`. `sizes` where the parts are not equal."""

    theirs: str
    ours: tuple[str, ...]
    dim: int = 0
    sizes: tuple[int, ...] | None = None
    into: Transform = same
    back: Transform = same


@dataclass(frozen=True)
class Drop:
    """Theirs that we have no use for. `restore` makes them anew, from our state, where their code insists on them."""

    theirs: str
    restore: Callable[[State], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Constant:
    """One of ours that the authors keep in their code instead of their files; `make` gives its published value."""

    ours: str
    make: Callable[[], Tensor]


Rule = Rename | Fuse | Split | Drop | Constant


class KeyTable:
    """An ordered list of rules; see the module's docstring."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        self._theirs = _Patterns([(_many(rule.theirs), rule) for rule in rules if not isinstance(rule, Constant)])
        self._ours = _Patterns([(_many(rule.ours), rule) for rule in rules if not isinstance(rule, Drop)])

    def to_ours(self, state: State) -> dict[str, Tensor]:
        """Our state dict from theirs. Tensors that need no change are shared, not copied.

        Raises MismatchError that names keys without a rule, and parts of a fused tensor that are missing.
        """
        ours: dict[str, Tensor] = {}
        for match in self._theirs.gather(state, "the checkpoint"):
            rule = match.rule
            assert not isinstance(rule, Constant)
            if isinstance(rule, Drop):
                continue
            parts = [rule.into(tensor) for tensor in match.tensors]
            names = [_fill(pattern, match.captures) for pattern in _many(rule.ours)]
            ours.update(zip(names, _recut(parts, len(names), rule), strict=True))
        return ours | {rule.ours: rule.make() for rule in self.rules if isinstance(rule, Constant)}

    def to_theirs(self, state: State) -> dict[str, Tensor]:
        """Their state dict from ours: the inverse of `to_ours`. Raises MismatchError for keys without a rule."""
        theirs: dict[str, Tensor] = {}
        for match in self._ours.gather(state, "the model"):
            rule = match.rule
            if isinstance(rule, Constant):
                continue
            assert not isinstance(rule, Drop)
            names = [_fill(pattern, match.captures) for pattern in _many(rule.theirs)]
            parts = [rule.back(part) for part in _recut(match.tensors, len(names), rule)]
            theirs.update(zip(names, parts, strict=True))
        for rule in self.rules:
            if isinstance(rule, Drop) and rule.restore is not None:
                theirs.update(rule.restore(state))
        return theirs

    def left_over(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys`, in the authors' names, that no rule speaks of."""
        return [key for key in keys if self._theirs.find(key) is None]


@dataclass
class _Match:
    rule: Rule
    captures: tuple[str, ...]
    tensors: list[Tensor]


@dataclass
class _Patterns:
    """Rules by the patterns of one side."""

    sides: list[tuple[tuple[str, ...], Rule]]
    compiled: list[tuple[re.Pattern[str], int, int]] = field(init=False)  # regex, its rule, its place in the rule
    known: dict[str, tuple[int, int, tuple[str, ...]] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compiled = [
            (_regex(pattern), number, place)
            for number, (patterns, _) in enumerate(self.sides)
            for place, pattern in enumerate(patterns)
        ]

    def find(self, key: str) -> tuple[int, int, tuple[str, ...]] | None:
        """The first rule that matches `key`: its number, the place among its patterns, what the wildcards matched."""
        if key not in self.known:
            hits = ((regex.fullmatch(key), number, place) for regex, number, place in self.compiled)
            self.known[key] = next(((number, place, hit.groups()) for hit, number, place in hits if hit), None)
        return self.known[key]

    def gather(self, state: State, where: str) -> list[_Match]:
        """Keys grouped into the rules' left (or right) sides, in the order of the state dict."""
        groups: dict[tuple[int, tuple[str, ...]], dict[int, Tensor]] = {}
        strangers = []
        for key, tensor in state.items():
            found = self.find(key)
            if found is None:
                strangers.append(key)
            else:
                number, place, captures = found
                groups.setdefault((number, captures), {})[place] = tensor
        if strangers:
            raise MismatchError(f"{where} holds keys that do not belong here: {few(strangers)}")
        matches = []
        for (number, captures), parts in groups.items():
            patterns, rule = self.sides[number]
            missing = [_fill(pattern, captures) for place, pattern in enumerate(patterns) if place not in parts]
            if missing:
                raise MismatchError(f"{where} lacks {few(missing)}")
            matches.append(_Match(rule, captures, [parts[place] for place in range(len(patterns))]))
        return matches


def few(names: Sequence[str], limit: int = 4) -> str:
    """The first few names and the number of the others, for messages."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _recut(parts: list[Tensor], count: int, rule: Rename | Fuse | Split) -> list[Tensor]:
    """Join the parts, or cut the only one, into `count` tensors along the rule's axis."""
    if len(parts) == count or isinstance(rule, Rename):
        return parts
    if count == 1:
        return [torch.cat(parts, rule.dim)]
    if rule.sizes is not None:
        return list(parts[0].split(rule.sizes, rule.dim))
    if parts[0].shape[rule.dim] % count:
        raise MismatchError(f"a tensor of shape {tuple(parts[0].shape)} cannot be cut into {count} along {rule.dim}")
    return list(parts[0].chunk(count, rule.dim))


def _many(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)"))


def _fill(pattern: str, captures: tuple[str, ...]) -> str:
    parts = re.split(r"[#*]", pattern)
    if len(parts) != len(captures) + 1:
        raise ValueError(f"pattern {pattern!r} has {len(parts) - 1} wildcards, its other side {len(captures)}")
    return parts[0] + "".join(captured + part for captured, part in zip(captures, parts[1:], strict=True))
