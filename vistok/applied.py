"""A reducer put into a model: `vistok.reduce(model, "tome", r=8)`, and out of it again.

    ViT    every block, or those at `at`: attention -- reducer --> MLP        vistok/sites.py
    LLaVA  projector -- reducer --> language model                            vistok/prompts.py

The model's own modules and weights stay as they are; a block's `forward`, or the forward and `generate` of a LLaVA, is
stood in for until `remove`. What is counted (FLOPs) and what is kept (the last pass) is in `Applied`.
"""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vistok.errors import InputError
from vistok.nn.flops import count_flops
from vistok.prompts import Prompt, prune, splice
from vistok.reducer import Place, Reducer, Reduction
from vistok.registry import create
from vistok.sites import SUPPORTED, BlockSite, Run, find_layout, site_of

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
DISTILL_TOKENS = ("dist_token", "distill_token", "distillation_token")
REGISTERS = ("register_tokens", "reg_token", "registers")


def reduce(
    model: nn.Module,
    reducer: Reducer | str,
    *,
    place: Place | None = None,
    at: Sequence[int] | None = None,
    protected: int | None = None,
    **changes: Any,
) -> "Applied":
    """Put a reducer into a model. `with vistok.reduce(...)` takes it out at the end, and so does `remove()`.

    reducer    a Reducer, or the name of one, whose settings `changes` override
    place      "block" or "prompt", where the model has both
    at         numbers of the blocks, from 0, at which it acts; all unless given
    protected  leading tokens that are left alone; as many as the model has class, distillation and register tokens

    Raises InputError for a model without a place for this reducer (naming those that have one), a model that has a
    reducer already, or blocks that do not exist; UnknownNameError and ConfigError as `vistok.create` does.
    """
    made = create(reducer, **changes) if isinstance(reducer, str) else reducer
    if not isinstance(made, Reducer):
        raise InputError(f"{made.name} is a {made.role}, no reducer")
    if changes and not isinstance(reducer, str):
        raise InputError(f"{made.name} is made already; {', '.join(changes)} can be set where it is given by name")
    if any(isinstance(vars(module).get("forward"), _StandIn) for module in model.modules()):
        raise InputError(f"this {type(model).__name__} has a reducer already; remove() that one first")
    reads_prompts = _is_llava(model)
    if place is None:
        place = "prompt" if reads_prompts and "prompt" in made.places else "block"
    if place not in made.places:
        raise InputError(f"{made.name} acts at {' or '.join(made.places)}, not at {place!r}")
    if place == "prompt":
        if not reads_prompts:
            raise InputError(
                f"a {type(model).__name__} has no prompt with visual tokens; models of transformers that have one: "
                "Llava and LlavaNext ...ForConditionalGeneration"
            )
        return AppliedToPrompt(model, made)
    if reads_prompts:
        raise InputError(
            f"{made.name} inside the vision tower of a {type(model).__name__} would leave fewer visual tokens than its "
            "prompt has places: put it at place='prompt', or into model.model.vision_tower for features alone"
        )
    return AppliedToBlocks(model, made, at, protected)


class Applied:
    """A reducer in a model; see `reduce`.

    model, reducer   as they were given
    place            "block" or "prompt"
    states           what became of the tokens in the last pass, one Reduction for each place, in order
    """

    place: Place

    def __init__(self, model: nn.Module, reducer: Reducer) -> None:
        self.model, self.reducer = model, reducer
        first = next(model.parameters(), None)
        if first is not None:
            reducer.to(first.device)
        self._stand_ins: list[tuple[nn.Module, str]] = []

    @property
    def states(self) -> list[Reduction]:
        """What became of the tokens in the last pass."""
        raise TypeError(f"{type(self).__name__} keeps no states")

    def remove(self) -> None:
        """Give the model its own forward back. Nothing happens where that was done before."""
        for module, name in self._stand_ins:
            vars(module).pop(name, None)
        self._stand_ins = []

    def flops(self, *inputs: Any, **options: Any) -> "Flops":
        """Operations of the model's forward pass on these inputs, without the reducer and with it."""
        held = [(module, name, vars(module).pop(name)) for module, name in self._stand_ins]
        try:
            before = count_flops(self.model, *inputs, **options)
        finally:
            for module, name, stand_in in held:
                vars(module)[name] = stand_in
        return Flops(before, count_flops(self.model, *inputs, **options))

    def _put(self, module: nn.Module, name: str, stand_in: "_StandIn") -> None:
        vars(module)[name] = stand_in
        self._stand_ins.append((module, name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"at {self.place}" if self._stand_ins else "removed"
        return f"{self.reducer.name} in {type(self.model).__name__} ({state})"


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass without a reducer and with it, two for a multiply-add."""

    before: int
    after: int

    @property
    def ratio(self) -> float:
        """What is left, as a share."""
        return self.after / self.before


class _StandIn:
    """Called in place of a module's own method, whose signature it shows. Copies with its module."""

    def __init__(self, applied: Applied, own: Any) -> None:
        self.applied, self.own = applied, own
        functools.update_wrapper(self, own)  # type: ignore[arg-type]  # an object that is called


# -- blocks ----------------------------------------------------------------------------------------------------------


class AppliedToBlocks(Applied):
    """A reducer between attention and MLP of a ViT's blocks."""

    place = "block"

    def __init__(
        self, model: nn.Module, reducer: Reducer, at: Sequence[int] | None = None, protected: int | None = None
    ) -> None:
        super().__init__(model, reducer)
        path, blocks = find_blocks(model)
        self.layers = len(blocks)
        if at is None and reducer.once:
            raise InputError(
                f"{reducer.name} acts once: say after the attention of which block, at=(3,), of 0 to {self.layers - 1}"
            )
        self.at = tuple(range(self.layers)) if at is None else tuple(at)
        if not self.at or not all(0 <= layer < self.layers for layer in self.at) or len(set(self.at)) < len(self.at):
            raise InputError(f"blocks {self.at}; expected some of 0 to {self.layers - 1}, each once")
        self.protected = count_protected(model, path) if protected is None else protected
        self.run = self._fresh()
        for index, block in enumerate(blocks):
            self._put(block, "forward", _Block(self, block.forward, site_of(block), first=not index))
        pool = getattr(model, "pool", None)
        if reducer.biased and getattr(model, "global_pool", None) == "avg" and inspect.ismethod(pool):  # timm
            self._put(model, "pool", _Pool(self, pool))

    @property
    def states(self) -> list[Reduction]:
        """What became of the tokens at each block in the last pass."""
        return self.run.states

    @property
    def counts(self) -> list[int]:
        """Tokens after each block in the last pass."""
        return self.run.counts

    def plan(self, tokens: int) -> tuple[int, ...]:
        """Tokens after each block of the model for so many that enter, protected ones included."""
        planned = iter(self.reducer.plan(tokens, len(self.at), protected=self.protected))
        left = []
        for layer in range(self.layers):
            tokens = next(planned) if layer in self.at else tokens
            left.append(tokens)
        return tuple(left)

    def restore(self, tokens: Tensor) -> Tensor:
        """Tokens (B, M, D) of the last pass back to as many as entered, (B, N, D)."""
        return self.run.restore(tokens)

    def _fresh(self) -> Run:
        return Run(self.reducer, self.layers, protected=self.protected, at=self.at)


class _Block(_StandIn):
    def __init__(self, applied: AppliedToBlocks, own: Any, site: BlockSite, first: bool) -> None:
        super().__init__(applied, own)
        self.site, self.first = site, first

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        applied = self.applied
        assert isinstance(applied, AppliedToBlocks)
        given = [*args, *options.values()]
        if any(isinstance(one, Tensor) or (isinstance(one, tuple) and one) for one in given) or options.get(
            "is_causal"
        ):
            raise InputError(
                f"{applied.reducer.name} changes which tokens there are; a mask over them, or rotary positions, that "
                f"this {type(self.site.block).__name__} is given cannot follow"
            )
        if self.first:
            applied.plan(x.shape[1])  # raises for a plan that does not fit
            applied.run = applied._fresh()
        return applied.run.block(self.site, x)


class _Pool(_StandIn):
    """timm's mean over patches: every token by how many it stands for."""

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        assert isinstance(self.applied, AppliedToBlocks)
        run = self.applied.run
        if run.sizes is not None and run.sizes.shape[1] == x.shape[1]:
            sizes, first = run.sizes.to(x.dtype), run.protected
            patches = sizes[:, first:]
            share = patches * patches.shape[1] / patches.sum(1, keepdim=True)
            x = torch.cat([x[:, :first], x[:, first:] * share[..., None]], 1)
        return self.own(x, *args, **options)


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The path and the blocks of a model's stack of ViT blocks; the vision half where there are two.

    Raises InputError where there is none, or more than one.
    """
    stacks = {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and all(map(find_layout, module))
    }
    if len(stacks) > 1:
        stacks = {path: blocks for path, blocks in stacks.items() if "vis" in path} or stacks
    if len(stacks) > 1:
        raise InputError(f"{type(model).__name__} has several stacks of blocks ({', '.join(stacks)}): give one's owner")
    if not stacks:
        raise InputError(
            f"{type(model).__name__} has no place for a reducer; known are the pre-norm blocks of {SUPPORTED}. "
            "Windowed models (Swin), torch.nn.MultiheadAttention and post-norm blocks have none"
        )
    return next(iter(stacks.items()))


def count_protected(model: nn.Module, path: str) -> int:
    """Class, distillation and register tokens before the patches of the stack of blocks at `path`."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        owner = model.get_submodule(".".join(parts[:depth]))
        if isinstance(getattr(owner, "num_prefix_tokens", None), int):
            return int(owner.num_prefix_tokens)  # type: ignore[arg-type]
        found = {name.rsplit(".", 1)[-1]: value for name, value in owner.named_parameters()}
        ones = [any(name in found for name in names) for names in (CLASS_TOKENS, DISTILL_TOKENS)]
        if any(ones):
            return sum(ones) + sum(found[name].shape[-2] for name in REGISTERS if name in found)
    return 0


# -- prompts ---------------------------------------------------------------------------------------------------------


class AppliedToPrompt(Applied):
    """A reducer between projector and language model of a LLaVA. Logits and labels are those of the shorter prompt.

    `generate` gives back prompt and answer, as the model does by itself.
    """

    place = "prompt"

    def __init__(self, model: nn.Module, reducer: Reducer) -> None:
        super().__init__(model, reducer)
        self.prompt: Prompt | None = None
        self._states: list[Reduction] = []
        self._put(model, "forward", _Forward(self, model.forward))
        if hasattr(model, "generate"):
            self._put(model, "generate", _Generate(self, model.generate))

    @property
    def states(self) -> list[Reduction]:
        """What became of the visual tokens in the last prompt: one Reduction for all its pictures."""
        return self._states

    def shorten(self, options: dict[str, Any], generating: bool = False) -> dict[str, Any]:
        """A LLaVA's inputs (`input_ids` and `pixel_values` among them) as `inputs_embeds` with fewer visual tokens."""
        model: Any = self.model
        rest = dict(options)
        ids, pixels = rest.pop("input_ids"), rest.pop("pixel_values")
        named = ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
        found = model.get_image_features(
            pixel_values=pixels, **{name: rest.pop(name) for name in named if rest.get(name) is not None}
        )
        features = getattr(found, "pooler_output", found)
        given = rest.get("attention_mask")
        mask = torch.ones_like(ids) if given is None else given
        visual = ids == _image_token(model.config)
        embeds = model.get_input_embeddings()(ids)
        whole = splice(embeds, mask, visual, list(features))
        side = "left" if generating else None
        self.prompt, self._states = prune(self.reducer, whole, side)  # type: ignore[arg-type]
        positions = self.prompt.positions
        assert positions is not None
        rest |= {"inputs_embeds": self.prompt.embeds, "attention_mask": self.prompt.mask}
        if rest.get("labels") is not None:
            labels = rest["labels"].gather(1, positions.clamp(min=0))
            rest["labels"] = labels.masked_fill(positions < 0, -100)
        if not generating:
            known = rest.get("position_ids")
            kept = None if known is None else known.expand(len(ids), -1).gather(1, positions.clamp(min=0))
            rest["position_ids"] = self.prompt.position_ids if kept is None else kept
        return rest


class _Forward(_StandIn):
    def __call__(self, *args: Any, **options: Any) -> Any:
        applied = self.applied
        assert isinstance(applied, AppliedToPrompt)
        named = inspect.signature(self.own).bind_partial(*args, **options).arguments
        named |= named.pop("kwargs", {})
        if named.get("pixel_values") is None or named.get("input_ids") is None:
            return self.own(*args, **options)
        return self.own(**applied.shorten(named))


class _Generate(_StandIn):
    def __call__(self, inputs: Tensor | None = None, **options: Any) -> Any:
        applied = self.applied
        assert isinstance(applied, AppliedToPrompt)
        ids = options.pop("input_ids", None) if inputs is None else inputs
        if ids is None or options.get("pixel_values") is None:
            return self.own(ids, **options)
        with torch.no_grad():
            shorter = applied.shorten({"input_ids": ids, **options}, generating=True)
        answer = self.own(**shorter)
        told = answer if isinstance(answer, Tensor) else answer.sequences
        whole = torch.cat([ids.repeat_interleave(len(told) // len(ids), 0), told], 1)
        if isinstance(answer, Tensor):
            return whole
        answer["sequences"] = whole
        return answer


def _image_token(config: Any) -> Any:
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _is_llava(model: nn.Module) -> bool:
    verbs = ("get_image_features", "get_input_embeddings", "generate")
    return all(hasattr(model, verb) for verb in verbs) and _image_token(getattr(model, "config", None)) is not None
