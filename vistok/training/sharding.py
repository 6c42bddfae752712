"""Models too large for one card: weights, gradients, moments and averages in shards, one for each process (FSDP2).

    model -> shard: blocks, then the rest, as units whose weights are together only while they compute
          -> train as ever: gradients arrive averaged, and each process steps its own shards
          -> Shards.whole: every tensor whole again, on the main process's CPU, for checkpoints and the model folder

PyTorch's `fully_shard` does the work; Accelerate gives processes and devices. It is the same code on GPUs (NCCL) and on
CPUs (gloo), which Accelerate's own FSDP refuses.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError

SMALLEST = 1 << 20  # parameters of a block that is worth a unit of its own: 4 MB in one exchange


_ASKED = False


def asked(setting: bool) -> bool:
    """Whether to shard: `train.fsdp`, or `accelerate launch --use_fsdp`.

    Of Accelerate's own configuration the switch alone is heeded, and taken out of its hands: it wraps a model together
    with one optimizer, which a run of several stages does not have, and on GPUs only.
    """
    global _ASKED
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        _ASKED = True
    return setting or _ASKED


def check_possible(accelerator: Any) -> None:
    """Raise ConfigError unless a model can be sharded among these processes."""
    if accelerator.num_processes == 1:
        raise ConfigError("train.fsdp shares a model among processes: start it with torchrun or accelerate launch")
    if accelerator.mixed_precision == "fp16":
        raise ConfigError("train.fsdp goes with train.precision bf16 or fp32, not fp16")


class Shards:
    """A training objective whose `model` is kept in shards.

    `plain`: a copy of the model that is not sharded, on the main process alone: what is validated and saved, filled by
    `whole`. `ema`: decay of the weights' average, which is sharded as they are; None for none. Every method is for all
    processes alike.
    """

    def __init__(self, objective: nn.Module, accelerator: Any, ema: float | None, plain: Any) -> None:
        self.objective: nn.Module = objective
        self.model: Any = objective.model
        self.main, self.decay, self.plain = accelerator.is_main_process, ema, plain
        self.units = _shard(objective, accelerator.device)
        self.averaged = {name: p.detach().clone() for name, p in self._floating()} if ema is not None else {}

    def refreeze(self) -> None:
        """Let gradients follow what `requires_grad` of the shards says now: whole weights have a flag of their own."""
        flags = {name: p.requires_grad for name, p in self.objective.named_parameters()}
        for unit in self.units:
            unit.unshard()
            for name, parameter in self.objective.named_parameters():
                parameter.requires_grad_(flags[name])
            unit.reshard()

    def _floating(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.is_floating_point()]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the averages, where there are any, after step `step`, as `Ema.update` does."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        theirs = [_local(p) for _, p in self._floating()]
        torch._foreach_lerp_([_local(value) for value in self.averaged.values()], theirs, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The model's whole state dict on the main process, an empty one elsewhere."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found: Any = get_model_state_dict(self.model, options=options)
        return dict(found)

    def averaged_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`state` with the averages in place of the weights, on the main process; an empty one elsewhere."""
        found = dict(state)
        for name, value in self.averaged.items():
            whole = value.full_tensor()  # type: ignore[attr-defined]
            if self.main:
                found[name] = whole.cpu()
        return found

    def whole(self, state: dict[str, Tensor] | None = None) -> Any:
        """The model to validate and to save, whole and averaged, on the main process; None elsewhere.

        `state`: what `averaged_state` gave just now, where it is at hand.
        """
        state = self.averaged_state(self.state()) if state is None else state
        if self.main:
            self.plain.load_state_dict(state)
        return self.plain

    def load_average(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's averages, whole on every process."""
        from torch.distributed.tensor import distribute_tensor

        for name, value in self.averaged.items():
            placed: Any = value
            given = state[name].to(placed.device, placed.dtype)
            _local(value).copy_(_local(distribute_tensor(given, placed.device_mesh, placed.placements)))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's whole state by parameter name on the main process, an empty one elsewhere."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_optimizer_state_dict(self.objective, optimizer, options=options))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Continue from what `optimizer_state` gave, whole on every process."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        # not strict: what has had no gradient yet has no moments either
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(self.objective, optimizer, state, options=options)


def together(norm: Tensor) -> Tensor:
    """A norm over shards as the plain scalar that it is."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def units(module: nn.Module) -> list[nn.Module]:
    """The blocks that become units: outermost members of a ModuleList or Sequential that compute by `forward`.

    Modules whose weights are read without calling them (codebooks, embeddings) stay with the rest, as small ones do.
    """
    found: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        listed = isinstance(parent, (nn.ModuleList, nn.Sequential))
        for child in parent.children():
            computes = type(child).forward is not nn.Module.forward and not isinstance(child, nn.Sequential)
            block = listed and computes and any(True for _ in child.children())
            if block and sum(p.numel() for p in child.parameters()) >= SMALLEST:
                found.append(child)
            else:
                visit(child)

    visit(module)
    return found


def _shard(objective: nn.Module, device: torch.device) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = units(objective)
    return [fully_shard(module, mesh=mesh) for module in [*blocks, objective]]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
