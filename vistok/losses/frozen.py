"""Nets that judge and are never trained: outside checkpoints, and with their gradient taken at once.

A frozen net's loss is differentiated as soon as it is computed, and only the gradient with respect to the pixels is
kept. Its activations are then free before the model's own backward pass begins, and a second look at the gradient (the
adaptive weight's) costs nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """Base of nets that are never trained: always in eval mode, and with no entries in state dicts of what holds them.

    Call `freeze()` when the net is built. Whoever resumes a run builds it again from its own file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_keep_own)

    def freeze(self) -> "Frozen":
        """No gradients to weights, eval mode. Returns itself."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in eval mode."""
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Nothing: what is frozen is not part of a checkpoint. `weights()` gives the tensors."""
        return kwargs.get("destination") if kwargs.get("destination") is not None else {}

    def weights(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Copy every tensor of `weights()` from `state`, whose names and shapes must be the same."""
        with torch.no_grad():
            for name, tensor in self.weights().items():
                tensor.copy_(state[name])


def _keep_own(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, Frozen)
    for name, tensor in module.weights().items():
        state_dict[prefix + name] = tensor.detach()


def at_once(pixels: Tensor, judge: Callable[[Tensor], Tensor]) -> Tensor:
    """`judge(pixels)`, (B,) or a scalar, with its gradient taken now and everything else forgotten.

    Each entry of a (B,) result may depend on its own item alone. Without gradients it is simply `judge(pixels)`.
    """
    if not (torch.is_grad_enabled() and pixels.requires_grad):
        return judge(pixels)
    leaf = pixels.detach().requires_grad_()
    value = judge(leaf)
    scale = 2.0**12 if torch.is_autocast_enabled(pixels.device.type) else 1.0  # half precision loses small gradients
    (gradient,) = torch.autograd.grad(value.sum() * scale, leaf)
    return _WithGradient.apply(pixels, value.detach(), gradient / scale)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        each = grad.reshape(grad.shape + (1,) * (gradient.ndim - grad.ndim))
        return each * gradient, None, None
