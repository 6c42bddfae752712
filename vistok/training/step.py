"""One step of training: the model's turn, then the discriminators', each with its own optimizer.

parts of the batch -> model.loss -> weighted terms -> backward -> check -> clip -> optimizer -> model.after_step
the same parts     -> model.discriminator_loss  -> backward -> check -> clip -> optimizer of each discriminator

Where a recipe lets them take turns (`model_every`), a step is one or the other; the model's terms are computed in both.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vistok.errors import ConfigError, VistokError, nearest
from vistok.training.judges import Judges, Verdict
from vistok.training.optimizer import build_optimizer, learning_rate, undecayed
from vistok.training.prepare import Objective, parts
from vistok.training.recipe import OptimizerSection, Recipe
from vistok.training.sharding import Shards, together


class DivergedError(VistokError, ArithmeticError):
    """The loss or the gradient is no longer finite."""


@dataclass
class Outcome:
    """What a step came to, on the device: `values` of the weighted `terms` and, last, the gradient's norm.

    facts: further scalars for the log, by column.
    """

    terms: list[str]
    values: Tensor
    facts: dict[str, Tensor]


class Step:
    """The optimizers of a stage that begins at step `first`, over what of `model` trains and over its judges.

    looks: check every step whether its numbers are finite; else the trainer asks (`check`), since looking is a wait.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        first: int,
        accelerator: Any,
        judges: Judges,
        doctor: Any,
        looks: bool,
        shards: Shards | None = None,
    ) -> None:
        self.model, self.recipe, self.first = model, recipe, first
        self.accelerator, self.judges, self.doctor, self.looks = accelerator, judges, doctor, looks
        self.shards = shards
        self.parameters = list(model.parameters())  # found once: going through many modules takes a while
        optimizer = build_optimizer(self.parameters, recipe.optimizer, undecayed(model))
        self.plain: Any = Objective(model) if shards is None else shards.objective
        if shards is None:
            self.objective, self.optimizer = accelerator.prepare(self.plain, optimizer)
        else:
            self.objective, self.optimizer = self.plain, optimizer
        self.verdict: Any = None
        self.judging: dict[str, Any] = {}
        if judges.adversaries:
            judges_turn = Verdict(judges, model)
            built = {
                role: build_optimizer(adversary.parameters(), judges.optimizers[role])
                for role, adversary in judges.adversaries.items()
            }
            self.verdict, *prepared = accelerator.prepare(judges_turn, *built.values())
            self.judging = dict(zip(built, prepared, strict=True))
        self.terms: list[str] = []
        self.rate = 0.0
        self.latest: Outcome | None = None
        self.norm: Tensor | None = None  # of the gradient of the model's latest turn
        self._weights_fit = False

    def take(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> Outcome:
        """Train on one batch. Raises DivergedError where it looks, ConfigError for the weight of a term that is not."""
        trains, judges = self.judges.turns(step)
        self.rate = self._set_rate(self.optimizer, self.recipe.optimizer, step)
        if trains:
            self.optimizer.zero_grad(set_to_none=True)
        values, seen, count = None, [], self.recipe.train.accumulate
        for index, part in enumerate(parts(batch, count)):
            with nullcontext() if index == count - 1 else self.accelerator.no_sync(self.objective):
                with torch.set_grad_enabled(trains), self._precision():
                    weighted = self._weigh(self.objective(part, step, rng))
                stacked = torch.stack([value.float() for value in weighted.values()]) / count
                values = stacked.detach() if values is None else values + stacked.detach()
                if trains:
                    self.accelerator.backward(stacked.sum())
            if judges:
                seen.append(self.plain.batch)
        assert values is not None
        if trains:
            self.accelerator.unscale_gradients(self.optimizer)
            self.doctor.observe(batch, weighted)
            self.norm = self._norm(self.parameters)
        norm = values.new_zeros(()) if self.norm is None else self.norm
        outcome = self.latest = Outcome(list(weighted), torch.cat([values, norm.to(values).reshape(1)]), {})
        if self.looks:
            self.check(step)
        if trains:
            self._clip(self.parameters, self.recipe.optimizer, norm)
            self.optimizer.step()
        if judges:
            self._judge(seen, step)
        if self.judges.acts(step):
            outcome.facts = self.judges.facts()
            if self.looks:
                self.check(step)
        if trains and hasattr(self.model, "after_step"):
            self.model.after_step(step)
        return outcome

    def _judge(self, seen: list[dict[str, Any]], step: int) -> None:
        """The discriminators' turn, on the reconstructions that the model was judged by."""
        for role, optimizer in self.judging.items():
            self._set_rate(optimizer, self.judges.optimizers[role], step)
            optimizer.zero_grad(set_to_none=True)
        for index, part in enumerate(seen):
            with nullcontext() if index == len(seen) - 1 else self.accelerator.no_sync(self.verdict):
                loss = self.verdict(part, step)
                if loss.requires_grad:
                    self.accelerator.backward(loss / len(seen))
        for role, optimizer in self.judging.items():
            parameters = list(self.judges.adversaries[role].parameters())
            if any(parameter.grad is not None for parameter in parameters):
                self.accelerator.unscale_gradients(optimizer)
                self._clip(parameters, self.judges.optimizers[role], self._norm(parameters))
                optimizer.step()

    def check(self, step: int) -> None:
        """Raise DivergedError, with the term or the parameter, unless the latest terms and gradient are finite."""
        if self.latest is None:
            return
        scaled = self.accelerator.scaler is not None  # where infinite gradients are how the loss scale finds its size
        values = self.latest.values[:-1] if scaled else self.latest.values
        facts = self.latest.facts
        judged = torch.stack([value.float() for value in facts.values()]) if facts else values[:0]
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(judged).all()):
            return
        found = dict(
            zip(self.latest.terms, values.tolist(), strict=False)
        )  # the gradient's norm, the last, has no name
        found |= dict(zip(facts, judged.tolist(), strict=True))
        names = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
        if names:
            raise DivergedError(f"loss term {', '.join(names)} at step {step}")
        broken = (
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(together(torch.isfinite(parameter.grad).all()))
        )
        raise DivergedError(f"the gradient of {next(broken, 'the loss')} is not finite at step {step}")

    def state_dict(self) -> dict[str, Any]:
        """Moments of all optimizers, the judges and the loss scale, for a checkpoint; for all processes to call."""
        scaler = self.accelerator.scaler
        shards = self.shards
        return {
            "optimizer": self.optimizer.state_dict() if shards is None else shards.optimizer_state(self.optimizer),
            "scaler": None if scaler is None else scaler.state_dict(),
            "judges": self.judges.state_dict(),
            "judging": {role: optimizer.state_dict() for role, optimizer in self.judging.items()},
            "norm": self.norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        if self.shards is None:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.shards.load_optimizer(self.optimizer, state["optimizer"])
        self.norm = state.get("norm")
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.judging:
            self.judges.load_state_dict(state["judges"])
            for role, optimizer in self.judging.items():
                optimizer.load_state_dict(state["judging"][role])

    # -- inside --------------------------------------------------------------------------------------------------

    def _precision(self) -> Any:
        """Accelerate wraps the objective in its own precision, but for one whose weights are in shards."""
        return nullcontext() if self.shards is None else self.accelerator.autocast()

    def _weigh(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = self.recipe.loss
        if not self._weights_fit:
            for name in weights:
                if name not in terms:
                    hint = nearest(name, list(terms)) or f"; its terms: {', '.join(terms)}"
                    raise ConfigError(f"loss.{name}: the model's loss has no such term{hint}")
            self._weights_fit = True
        return {name: value * weights[name] if name in weights else value for name, value in terms.items()}

    def _set_rate(self, optimizer: Any, section: OptimizerSection, step: int) -> float:
        rate = learning_rate(section, step - self.first, self.recipe.train.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return together(get_total_norm(grads))

    def _clip(self, parameters: Iterable[nn.Parameter], section: OptimizerSection, norm: Tensor) -> None:
        if section.clip is not None:  # after the check, which would find every gradient spoilt by a NaN norm
            trained = [parameter for parameter in parameters if parameter.grad is not None]
            clip_grads_with_norm_(trained, section.clip, norm)
