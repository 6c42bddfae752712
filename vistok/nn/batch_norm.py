"""Batch normalisation whose statistics are those of the batches of all processes together, on any device.

PyTorch's own `SyncBatchNorm` refuses the CPU; this one works wherever the process group does, with batches of different
sizes too, and is PyTorch's plain batch norm when there is one process. Two processes that each hold half of a batch
then normalise, and pass gradients, as one process with the whole batch would.
"""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vistok.processes import shared_sum, sum_over_processes, world_size


class SharedBatchNorm(_BatchNorm):
    """Normalises (B, C, ...) over all axes but the second, of all processes; arguments and buffers are PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...), any number of further axes."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = x.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = sum_over_processes(
            torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64, device=x.device)
        ).float()
        mean = shared_sum(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = shared_sum(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._follow(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        normal = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm takes (B, C, ...), got {tuple(input.shape)}")


class ActNorm(torch.nn.Module):
    """scale * (x + shift) per channel, set from the first training batch to mean 0 and deviation 1.

    Source: Glow (arXiv:1807.03039); an option of VQGAN's discriminator.
    """

    initialised: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1, width, 1, 1))
        self.scale = torch.nn.Parameter(torch.ones(1, width, 1, 1))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        if self.training and not self.initialised:
            with torch.no_grad():
                wide = x.float()
                count = sum_over_processes(wide.new_tensor([x.numel() // x.shape[1]]))
                mean = sum_over_processes(wide.sum((0, 2, 3))) / count
                spread = sum_over_processes((wide - mean[:, None, None]).square().sum((0, 2, 3))) / (count - 1)
                self.shift.copy_(-mean[None, :, None, None])
                self.scale.copy_(1 / (spread.sqrt() + 1e-6)[None, :, None, None])
                self.initialised.fill_(True)
        return self.scale * (x + self.shift)
