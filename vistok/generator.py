"""The contract of generators: a condition -> Tokens, which the tokenizer that they were made for decodes.

    condition (B,) --generate--> Tokens of `spec` --tokenizer.decode--> pixels
    batch {"codes" | "tokens" | "pixels", "label"} --loss--> {term: scalar}

A system sets `spec`, `sampling` (its published settings) and `classes`, and defines `sample` and `loss`. Conditions,
seeds, known tokens, provenance and errors are dealt with here, once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from operator import index
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from vistok.errors import ConfigError, InputError, MismatchError, nearest
from vistok.layout import Clips, Segment, Sizes, TokenSpec
from vistok.model import Aside, Model
from vistok.sampling.tokens import Sampling
from vistok.tokenizer import Tokenizer
from vistok.tokens import Source, Tokens


class Known(NamedTuple):
    """Tokens that are given: codes (B, N[, C]), or vectors (B, N, D), and which positions hold them, bool (B, N)."""

    data: Tensor
    present: Tensor


class Generator(Model):
    """Base of all generators; see the module's docstring.

    spec         the layout of what is produced: a tokenizer's
    classes      number of classes that a condition may name; None where it takes no class
    class_names  their names, where there are any: a condition may then be a name
    sampling     published settings, used where `generate` is not told otherwise
    """

    role: ClassVar[str] = "generator"
    spec: TokenSpec
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    sampling: Sampling = Sampling()

    def __init__(self, config: Any, name: str | None = None) -> None:
        super().__init__(config, name)
        self._attached, self._text_encoder = Aside(), Aside()

    # -- for users -----------------------------------------------------------------------------------------------

    def generate(
        self,
        condition: Any = None,
        *,
        count: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        known: Tokens | None = None,
        **options: Any,
    ) -> Tokens:
        """Tokens for a batch of conditions.

        condition    a class (its number or its name), or a sequence of them, one per item; None without a class
        count        how many items, where the condition is a single one or None
        guidance, temperature, top_k, top_p    as `vistok.sampling.tokens.Sampling`; None is the published setting
        seed         item i draws from seed + i, or from seed[i]: an item does not depend on the others of its batch
        known        Tokens of this layout that are kept as they are: a prefix, or those that its `keep` marks
        options      what the system adds, such as `steps`

        Raises InputError for what does not fit, MismatchError for known tokens of another tokenizer or layout.
        """
        self._check_options(options)
        given: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling = replace(self.sampling, **{name: value for name, value in given.items() if value is not None})
        items = self._items(condition, count, seed, known)
        conditions = self.conditions(condition, items)
        seeds = [seed + item for item in range(items)] if isinstance(seed, int) else [int(one) for one in seed]
        if len(seeds) != items:
            raise InputError(f"{len(seeds)} seeds for {items} items")
        with torch.no_grad(), _Evaluation(self):
            data = self.sample(conditions, seeds=seeds, sampling=sampling, known=self._known(known, items), **options)
        return Tokens(
            self.spec.segments,
            codes=None if data.is_floating_point() else data,
            vectors=data if data.is_floating_point() else None,
            canvas=(self.spec.canvas,) * items,
            source=self.source,
        )

    def attach(self, tokenizer: Tokenizer) -> "Generator":
        """Say whose tokens these are: `loss` may then be given pixels, and what is generated names its tokenizer.

        The tokenizer does not become part of the model. Raises MismatchError where layouts differ, or where the
        generator was made for another tokenizer.
        """
        try:
            theirs = tokenizer.spec.of(self.spec.canvas).segments
        except InputError as error:
            raise MismatchError(
                f"{self.name} makes tokens of {_told(self.spec.segments)}; {tokenizer.name}: {error}"
            ) from error
        if theirs != self.spec.segments:
            raise MismatchError(
                f"{self.name} makes tokens of {_told(self.spec.segments)}, {tokenizer.name} has {_told(theirs)}"
            )
        made_for = self.source
        if made_for is not None and made_for.weights != tokenizer.fingerprint:
            raise MismatchError(
                f"{self.name} was made for {made_for.name!r} (weights {made_for.weights[:8]}), "
                f"not for this {tokenizer.name!r} (weights {tokenizer.fingerprint[:8]})"
            )
        self._attached.held = tokenizer.eval()
        self.config = replace(self.config, tokenizer=tokenizer.source)
        return self

    def attach_text(self, encoder: Callable[[Sequence[str]], Any]) -> Self:
        """Let strings be read by `encoder`, such as `vistok.nn.t5_text.T5Text`, instead of by the published one.

        It does not become part of the model. Raises InputError for a model that reads no text.
        """
        if getattr(self.config, "text", None) is None:
            raise InputError(f"{self.name} takes {'no text' if self.classes is None else 'classes, not text'}")
        self._text_encoder.held = encoder
        return self

    def learn_from(self, teachers: Mapping[str, Any], *, fresh: bool = True) -> None:
        """The trainer's word for `attach`: {"tokenizer": a tokenizer}. Raises ConfigError for other roles."""
        strangers = sorted(set(teachers) - {"tokenizer"})
        if strangers:
            raise ConfigError(f"{self.name} learns from a tokenizer alone, not from {', '.join(strangers)}")
        self.attach(teachers["tokenizer"])

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was attached."""
        return self._attached.held

    @property
    def source(self) -> Source | None:
        """The tokenizer that this generator was made for, as far as it is known."""
        return getattr(self.config, "tokenizer", None)

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Training terms for one batch; their sum is minimised. Systems define it.

        `batch` holds "codes" (B, N[, C]), "tokens" (Tokens), or "pixels" in [0, 1] where a tokenizer is attached, and
        "label" (B,) where the model has classes.
        """
        raise TypeError(f"{type(self).__name__} does not define a training loss")

    # -- for systems ---------------------------------------------------------------------------------------------

    def sample(
        self, conditions: Tensor | None, *, seeds: list[int], sampling: Sampling, known: Known | None, **options: Any
    ) -> Tensor:
        """Codes (B, N[, C]) or vectors (B, N, D) of all positions. Systems define it."""
        raise TypeError(f"{type(self).__name__} does not define sample")

    def conditions(self, condition: Any, items: int) -> Tensor | None:
        """Class numbers (B,) on the model's device; None for a model without classes, or for no condition."""
        if condition is None or self.classes is None:
            if condition is not None:
                raise InputError(f"{self.name} is unconditional; leave the condition out")
            return None
        listed = list(condition) if _several(condition) else [condition] * items
        if len(listed) != items:
            raise InputError(f"{len(listed)} conditions for {items} items")
        return torch.tensor([self.class_number(one) for one in listed], dtype=torch.long, device=self.device)

    def class_number(self, condition: Any) -> int:
        """The number of a class, given by number or name. Raises InputError that names the nearest ones."""
        assert self.classes is not None
        if isinstance(condition, str):
            if condition in self.class_names:
                return self.class_names.index(condition)
            known = (
                f"; it knows {', '.join(self.class_names[:12])}" if self.class_names else "; its classes are numbers"
            )
            raise InputError(f"{self.name} has no class {condition!r}{nearest(condition, self.class_names) or known}")
        try:
            number = -1 if isinstance(condition, bool) else index(condition)
        except TypeError:
            number = -1
        if not 0 <= number < self.classes:
            raise InputError(f"{self.name} has no class {condition!r}; its classes are 0..{self.classes - 1}")
        return number

    def batch_tokens(self, batch: dict[str, Any], *, rng: torch.Generator | None = None) -> Tensor:
        """Codes (B, N[, C]) or vectors (B, N, D) of a training batch, on the model's device.

        With `rng`, pixels become a draw from the tokenizer's Gaussian, where it has one, instead of its mode.

        Raises InputError where there are none, MismatchError for tokens of another tokenizer or layout.
        """
        if batch.get("codes") is not None:
            data = batch["codes"]
        elif isinstance(batch.get("tokens"), Tokens):
            self._check(batch["tokens"])
            data = batch["tokens"].data
        elif batch.get("pixels") is not None and self.tokenizer is not None:
            tokenizer, pixels = self.tokenizer.to(self.device), batch["pixels"]
            seeds, options = [0] * len(pixels), dict[str, Any]()
            if rng is not None and "sample" in signature(tokenizer.tokenize).parameters:
                drawn = torch.randint(2**62, (len(pixels),), generator=rng, device=rng.device)
                seeds, options = drawn.tolist(), {"sample": True}
            with tokenizer.inference(), torch.autocast(self.device.type, enabled=False):
                encoded = tokenizer.tokenize(pixels, tokenizer.spec.of(self.spec.canvas), seeds=seeds, **options)
            data = encoded.codes if encoded.codes is not None else encoded.vectors
        else:
            raise InputError(
                f"{self.name} learns from batch['codes'], batch['tokens'], or from batch['pixels'] with a tokenizer: "
                "call attach(tokenizer) first"
            )
        if data.shape[1] != self.spec.length:
            raise MismatchError(f"a batch of {data.shape[1]} tokens an item, {self.name} has {self.spec.length}")
        return data.to(self.device)

    def batch_labels(self, batch: dict[str, Any], items: int) -> Tensor:
        """Class numbers (B,) of a training batch. Raises InputError where they are missing or out of range."""
        label = batch.get("label")
        if label is None:
            raise InputError(f"{self.name} learns with classes: the data needs labels (batch['label'])")
        label = torch.as_tensor(label, dtype=torch.long, device=self.device)
        if len(label) != items or (items and not 0 <= int(label.min()) <= int(label.max()) < (self.classes or 0)):
            raise InputError(f"labels {label.tolist()[:8]} for {items} items of {self.classes} classes")
        return label

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_options(self, options: dict[str, Any]) -> None:
        taken = [name for name in signature(self.sample).parameters if name not in _OF_THE_CONTRACT]
        for name in options:
            if name not in taken:
                known = f"; it takes {', '.join(taken)}" if taken else "; it takes none of its own"
                raise InputError(f"{self.name} has no option {name!r}{nearest(name, taken) or known}")

    def _items(self, condition: Any, count: int | None, seed: Any, known: Tokens | None) -> int:
        told = {
            "conditions": len(condition) if _several(condition) else None,
            "count": count,
            "seeds": None if isinstance(seed, int) else len(seed),
            "known tokens": None if known is None else len(known),
        }
        given = {name: number for name, number in told.items() if number is not None}
        if len(set(given.values())) > 1:
            raise InputError(
                "numbers of items differ: " + ", ".join(f"{number} {name}" for name, number in given.items())
            )
        items = next(iter(given.values()), 1)
        if items < 1:
            raise InputError(f"{items} items to generate; expected at least 1")
        return items

    def _known(self, known: Tokens | None, items: int) -> Known | None:
        if known is None:
            return None
        self._check(known)
        data = known.to(self.device).data
        missing = self.spec.length - data.shape[1]
        padding = [0, 0] * (data.ndim - 2) + [0, missing]
        present = data.new_ones(data.shape[:2], dtype=torch.bool) if known.keep is None else known.keep.to(data.device)
        if known.codes is not None:
            if data.ndim == 2:
                present = present & data.ge(0)
            else:  # a segment with fewer codes than others has none in the last columns
                columns = [len(segment.codebooks) for segment in self.spec.segments for _ in range(segment.count)]
                there = torch.arange(data.shape[2]) < torch.tensor(columns)[: data.shape[1], None]
                present = present & (data.ge(0) | ~there.to(data.device)).all(-1)
        return Known(torch.nn.functional.pad(data, padding), torch.nn.functional.pad(present, [0, missing]))

    def _check(self, tokens: Tokens) -> None:
        if tokens.segments != self.spec.segments:
            raise MismatchError(
                f"{self.name} takes tokens of {_told(self.spec.segments)}, not {_told(tokens.segments)}"
            )
        made_for, made_by = self.source, tokens.source
        if made_for is not None and made_by is not None and made_for.weights != made_by.weights:
            raise MismatchError(
                f"these tokens were made by {made_by.name!r} (weights {made_by.weights[:8]}), "
                f"{self.name} was made for {made_for.name!r} (weights {made_for.weights[:8]})"
            )


_OF_THE_CONTRACT = ("conditions", "seeds", "sampling", "known", "options")


def known_prefix(known: Known | None, name: str) -> int:
    """How many leading positions are known. Raises InputError where known positions are not a prefix, alike for all."""
    if known is None:
        return 0
    length = int(known.present[0].sum())
    if not bool((known.present == (torch.arange(known.present.shape[1], device=known.present.device) < length)).all()):
        raise InputError(f"{name} generates in order: what is known must be a prefix, as long in every item")
    return length


def fixed_spec(segments: tuple[Segment, ...], side: int, frames: int | None = None) -> TokenSpec:
    """The spec of what a generator of one size makes: `segments`, decoded to pictures of `side` pixels, or clips."""
    return TokenSpec(
        size=(side, side),
        layout=lambda *size: segments,
        sizes=Sizes(only=((side, side),)),
        modality="image" if frames is None else "video",
        clips=None if frames is None else Clips(first=frames, maximum=frames),
        frames=frames,
    )


def drop_labels(labels: Tensor, share: float, null: int, rng: torch.Generator) -> Tensor:
    """Labels (B,) of which a random share is replaced by the class that stands for none (arXiv:2207.12598)."""
    if not 0 <= share < 1:
        raise ConfigError(f"label dropout {share}; expected a share of at least 0 and below 1")
    dropped = torch.rand(labels.shape, generator=rng, device=rng.device).to(labels.device) < share
    return torch.where(dropped, null, labels)


def _several(condition: Any) -> bool:
    """Whether there is a condition for each item: a sequence, a tensor with a batch axis, a record of features."""
    if isinstance(condition, (str, bytes, Mapping)) or not hasattr(condition, "__len__"):
        return False
    return getattr(condition, "ndim", 1) > 0


class _Evaluation:
    """Evaluation mode of a model, put back afterwards."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.training = model, [module for module in model.modules() if module.training]

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        for module in self.training:
            module.training = True


def _told(segments: tuple[Segment, ...]) -> str:
    parts = []
    for segment in segments:
        books = segment.codebooks
        each = f"{len(books)} codes of {books[0]}" if len(set(books)) == 1 else str(books or f"{segment.dim} numbers")
        parts.append(f"{segment.name} {'x'.join(map(str, segment.shape))} ({each})")
    return ", ".join(parts)
