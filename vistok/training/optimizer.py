"""Optimizers and their schedule, as pure functions of the step: nothing in them needs to be remembered but moments."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vistok.training.recipe import OptimizerSection


def build_optimizer(parameters: Iterable[nn.Parameter], section: OptimizerSection) -> torch.optim.Optimizer:
    """An optimizer over the parameters that train; weight decay on those with two axes or more."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(parameter.is_floating_point() and parameter.device.type in FUSED for parameter in trained)
    if section.name == "sgd":
        fused = fused and not any(isinstance(parameter, DTensor) for parameter in trained)  # which has no fused SGD
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.betas[0], fused=fused)
    build = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return build(groups, lr=section.lr, betas=section.betas, fused=fused)


FUSED = ("cpu", "cuda", "mps", "xpu")


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: a linear rise over `warmup` steps, then constant or half a cosine."""
    if step < section.warmup:
        return section.lr * (step + 1) / section.warmup
    if section.schedule == "constant":
        return section.lr
    progress = (step - section.warmup) / max(1, steps - section.warmup)
    return section.lr * (section.final + (1 - section.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
