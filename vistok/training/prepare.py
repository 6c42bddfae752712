"""What a run is built from: the device, the model of the recipe, what of it trains, and batches where it wants them."""

import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vistok
from vistok.config import from_plain, to_plain
from vistok.data.items import Source
from vistok.errors import ConfigError, MissingExtraError, nearest
from vistok.generator import Generator
from vistok.quantize import Quantizer
from vistok.registry import system_of
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens
from vistok.training.recipe import ModelSection, Recipe, StageSection

PATIENCE = timedelta(hours=2)  # that the others wait while the main process validates or writes


def accelerator(precision: str) -> Any:
    """Accelerate's view of devices and processes. Raises ConfigError for a precision that the device lacks."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtraError("training needs Accelerate: pip install vistok[train]") from error
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # its successor is too new
    AcceleratorState._reset_state()  # one process may train twice, with another precision
    try:
        return Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=not torch.accelerator.is_available(),  # else torchrun on a CPU would start runs that know nothing of
            kwargs_handlers=[  # each other
                # buffers are not sent around: codebook statistics agree by themselves, counts are each process's own
                DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ValueError as error:
        raise ConfigError(f"train.precision {precision} does not work on this device: {error}") from error


def config_of(section: ModelSection) -> Any:
    """The config of the fresh model that a section names. Raises UnknownNameError, ConfigError."""
    system, config = system_of(str(section.name))
    return from_plain(system.config, {**to_plain(config), **section.changes}, "model")


def build_model(section: ModelSection) -> Any:
    """The model that a recipe names, fresh or with the weights it starts from.

    A generator gets its tokenizer attached. Raises UnknownNameError; ConfigError for a field or value that its config
    does not take, or a model without a loss; MismatchError where generator and tokenizer do not fit.
    """
    if section.init is not None:
        model = vistok.load(section.init)
    else:
        checked = config_of(section)
        model = vistok.create(str(section.name), **{key: getattr(checked, key) for key in section.changes})
    loss = getattr(type(model), "loss", None)
    if loss in (None, Tokenizer.loss, Generator.loss):
        raise ConfigError(f"{model.name} does not define a training loss, so no recipe can train it")
    if section.tokenizer is None:
        return model
    if not isinstance(model, Generator):
        raise ConfigError(f"model.tokenizer is for generators; {model.name} is a {model.role}")
    return model.attach(vistok.load(section.tokenizer))


def check_tokenizer(recipe: Recipe) -> None:
    """Raise ConfigError for a generator that is given no tokenizer."""
    section = recipe.model
    if section.name is None or section.tokenizer is not None or "tokenizer" in recipe.teachers:
        return
    if issubclass(system_of(section.name)[0].model, Generator):
        raise ConfigError(
            f"{section.name} learns the tokens of a tokenizer: set model.tokenizer to the folder of one, such as "
            "RUN/model, or to a name from `vistok list`; or teachers.tokenizer to an earlier stage"
        )


def check_conditions(recipe: Recipe, source: Source) -> None:
    """Raise ConfigError for a generator of classes or texts whose data have none, or more classes than it knows."""
    section = recipe.model
    if section.name is None or not issubclass(system_of(section.name)[0].model, Generator):
        return
    config = config_of(section)
    classes, text = getattr(config, "classes", None), getattr(config, "text", None)
    if classes and not source.labelled:
        raise ConfigError(
            f"{section.name} learns with classes, and {source.name} has no labels; expected pictures in a folder for "
            "each class, or files with labels"
        )
    if classes and len(source.classes) > classes:
        raise ConfigError(
            f"{source.name} has {len(source.classes)} classes and {section.name} knows {classes}: "
            f"model.classes={len(source.classes)}"
        )
    if text and not source.captioned:
        raise ConfigError(f"{section.name} learns with texts, and {source.name} has no captions")


def check_stored(recipe: Recipe, made_by: str) -> None:
    """Raise ConfigError for a model that learns from pictures where the data are the tokens of `made_by`."""
    section = recipe.model
    if section.name is not None and not issubclass(system_of(section.name)[0].model, Generator):
        raise ConfigError(
            f"the data are a token store (by {made_by!r}), which trains generators; {section.name} learns from "
            "pictures. Of a recipe with a stage for the tokenizer, stages=[] leaves the generator"
        )


def suit(model: Any, tokens: Tokens) -> None:
    """Make a generator ready for stored tokens: whoever made them is what it is for.

    Raises ConfigError for another kind of model, MismatchError for tokens of another layout, or of another tokenizer
    than the one that the generator was made for or was given.
    """
    if not isinstance(model, Generator):
        raise ConfigError(f"{model.name} learns from pictures, and the data are a token store")
    model.batch_tokens({"tokens": tokens})
    if model.source is None and tokens.source is not None:
        model.config = replace(model.config, tokenizer=tokens.source)


@torch.no_grad()
def start_from(model: Any, source: nn.Module) -> list[str]:
    """Take what has the same name and shape from another model. Returns the names of what stays as it was.

    A model's `started()` then makes of it what it needs.
    """
    theirs = source.state_dict()
    left = []
    for name, tensor in model.state_dict().items():
        if name in theirs and theirs[name].shape == tensor.shape:
            tensor.copy_(theirs[name])
        else:
            left.append(name)
    if hasattr(model, "started"):
        model.started()
    return left


def teach(model: Any, teachers: dict[str, str], load: Callable[[str], Any], fresh: bool) -> None:
    """Give a model its teachers, by role: frozen, and no part of it. `fresh`: it may take weights of theirs.

    Raises ConfigError for a model that has no teachers, or none of these.
    """
    if not teachers:
        return
    if not hasattr(model, "learn_from"):
        raise ConfigError(f"{model.name} learns from no teacher: drop teachers from the recipe")
    loaded = {role: load(name).requires_grad_(False).eval() for role, name in teachers.items()}
    model.learn_from(loaded, fresh=fresh)


def recompute(model: nn.Module) -> int:
    """Let the blocks of the model's stacks compute their insides again in the backward pass. Returns how many do.

    A block is an entry of a ModuleList, the outermost that has a forward of its own. Numbers stay the same.
    """
    count = 0

    def wrap(module: nn.Module) -> None:
        nonlocal count
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (module.training and torch.is_grad_enabled()):
                return plain(*args, **kwargs)
            return checkpoint(plain, *args, use_reentrant=False, **kwargs)

        module.forward = forward  # type: ignore[method-assign]
        count += 1

    def visit(module: nn.Module, stacked: bool) -> None:
        has_forward = type(module).forward is not nn.Module.forward and not isinstance(module, nn.ModuleList)
        if isinstance(module, Quantizer):  # which learns in its forward pass
            return
        if stacked and has_forward and any(True for _ in module.parameters()):
            wrap(module)
            return
        for child in module.children():
            visit(child, stacked or isinstance(module, nn.ModuleList))

    visit(model, False)
    return count


def compile_parts(model: nn.Module) -> None:
    """Compile the parts of a model in place, but for its quantizer, whose bookkeeping is no graph.

    Raises ConfigError where this machine has nothing to compile with.
    """
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    parameter = next(model.parameters())
    try:
        probe = torch.compile(lambda x: x.sin() + 1)
        probe(parameter.detach().reshape(-1)[:8].float())
    except (InductorError, InvalidCxxCompiler, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"train.compile needs what torch.compile needs, on a CPU a C++ compiler: {str(error).splitlines()[0]}; "
            "train.compile=false goes without"
        ) from error
    for name, child in model.named_children():
        if name != "quantizer" and any(True for _ in child.parameters()):
            child.compile()


class Objective(nn.Module):
    """The model's loss as a forward pass, which is what Accelerate wraps: autocast, and gradients across processes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.batch: dict[str, Any] = {}

    def forward(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """The terms, scalars by name. `batch` stays, with what the loss put into it for a discriminator's turn."""
        self.batch = batch
        return self.model.loss(batch, step, rng)


def freeze(model: nn.Module, stage: StageSection, trainable: set[str]) -> None:
    """Let the parameters named `trainable` train, but hold those of the stage's `freeze`, in evaluation mode.

    Raises ConfigError for a pattern that matches nothing, or where nothing is left to train.
    """
    matched: set[str] = set()

    def held(name: str) -> bool:
        hits = {pattern for pattern in stage.freeze if fnmatchcase(name, pattern) or name.startswith(pattern + ".")}
        matched.update(hits)
        return bool(hits)

    for name, module in model.named_modules():
        if name and held(name):
            module.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not held(name) and name in trainable)
    names = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    for pattern in stage.freeze:
        if pattern not in matched:
            raise ConfigError(f"stage {stage.name!r} freezes {pattern!r}, which is not there{nearest(pattern, names)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"stage {stage.name!r} has nothing left to train")


def place(batch: dict[str, Any], device: torch.device, channels_last: bool) -> dict[str, Any]:
    """A batch with its tensors on `device`, pictures in the memory order that the model runs in."""
    placed = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
            if channels_last and value.ndim == 4:
                value = value.contiguous(memory_format=torch.channels_last)
        placed[key] = value
    return placed


def parts(batch: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """The batch in `count` equal parts along its items."""
    if count == 1:
        yield batch
        return
    size = len(next(iter(batch.values()))) // count
    for start in range(0, size * count, size):
        yield {key: value[start : start + size] for key, value in batch.items()}


class StopSignals:
    """While open, SIGTERM and the first Ctrl-C only set `received`; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: the caller keeps its own handling
            self._before.clear()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])
