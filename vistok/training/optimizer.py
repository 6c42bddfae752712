"""Optimizers and their schedule, as pure functions of the step: nothing in them needs to be remembered but moments."""

import math
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vistok.training.recipe import OptimizerSection


def build_optimizer(
    parameters: Iterable[nn.Parameter], section: OptimizerSection, spared: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """An optimizer over the parameters that train; weight decay on those of two axes or more that are not `spared`."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    without = {id(parameter) for parameter in spared} | {id(p) for p in trained if p.ndim < 2}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in without], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if id(p) in without], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(parameter.is_floating_point() and parameter.device.type in FUSED for parameter in trained)
    if section.name == "sgd":
        fused = fused and not any(isinstance(parameter, DTensor) for parameter in trained)  # which has no fused SGD
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.betas[0], fused=fused)
    build = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return build(groups, lr=section.lr, betas=section.betas, fused=fused)


def undecayed(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the model's `undecayed` names, by shell pattern: weight decay leaves them alone."""
    patterns = getattr(model, "undecayed", ())
    return [value for name, value in model.named_parameters() if any(fnmatchcase(name, one) for one in patterns)]


FLAT = 0.05  # of the steps after the warm-up, before a "linear" schedule falls
FUSED = ("cpu", "cuda", "mps", "xpu")


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: a linear rise over `warmup` steps, then constant, half a cosine, or a line
    that falls after a twentieth of the way (VAR's).
    """
    if step < section.warmup:
        return section.lr * (step + 1) / section.warmup
    if section.schedule == "constant":
        return section.lr
    progress = (step - section.warmup) / max(1, steps - section.warmup)
    if section.schedule == "linear":
        return section.lr * (section.final + (1 - section.final) * min(1.0, max(0.0, 1 - progress) / (1 - FLAT)))
    return section.lr * (section.final + (1 - section.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
