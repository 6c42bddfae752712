"""What judges a stage's reconstructions, built from the recipe: a perceptual distance, and discriminators that train.

    recipe -> Judges -> model.judge(adversary, perceptual)         the model's loss has their terms from then on
    after the model's step: model.discriminator_loss(batch, step) -> backward, clip, step of their own optimizer

Judges are no part of the model and of its files; checkpoints hold their weights and moments.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.discriminators import build_discriminator
from vistok.losses.perceptual import build_perceptual
from vistok.training.recipe import AdversarySection, Recipe

ROLES = ("adversary", "clip_adversary")
# what an AdversarialLoss measures of itself -> the column of log.csv
COLUMNS = {
    "real_logits": "logits_real",
    "fake_logits": "logits_fake",
    "adaptive_weight": "adaptive_weight",
    "lecam": "lecam",
    "penalty": "penalty",
}


class Judges:
    """The judges of the stage that begins at step `first`, on `device`. Raises ConfigError, UnknownNameError."""

    def __init__(self, recipe: Recipe, first: int, device: torch.device) -> None:
        section = recipe.perceptual
        self.perceptual: Any = None
        if section is not None:
            self.perceptual = build_perceptual(section.name, section.weights, **section.options).to(device)
        sections = {role: getattr(recipe, role) for role in ROLES if getattr(recipe, role) is not None}
        self.adversaries = {role: _build(section, first).to(device) for role, section in sections.items()}
        self.optimizers = {role: recipe.adversary_optimizer(section) for role, section in sections.items()}
        self.start = min((adversary.start for adversary in self.adversaries.values()), default=0)
        self.model_every = max((section.model_every for section in sections.values()), default=1)

    def __bool__(self) -> bool:
        return self.perceptual is not None or bool(self.adversaries)

    def attach(self, model: Any) -> None:
        """Let the model's loss use them. Raises ConfigError for a model that is not judged, or not by so many."""
        given: dict[str, Any] = dict.fromkeys(ROLES[:1]) | dict(self.adversaries)
        judge = getattr(model, "judge", None)
        if judge is None:
            if self:
                raise ConfigError(f"{model.name} is not judged: drop perceptual and adversary from the recipe")
            return
        try:
            judge(perceptual=self.perceptual, **given)
        except TypeError as error:
            raise ConfigError(f"{model.name} has no place for {' and '.join(given)}: {error}") from error

    def acts(self, step: int) -> bool:
        """Whether a discriminator trains at this step."""
        return bool(self.adversaries) and step >= self.start

    def turns(self, step: int) -> tuple[bool, bool]:
        """Whether the model and the discriminators take their turns at this step: both, or one of them.

        From the first judgement on one step in `model_every` is the model's, the others are the discriminators'.
        """
        if not self.acts(step) or self.model_every == 1:
            return True, self.acts(step)
        models = (step - self.start) % self.model_every == 0
        return models, not models

    def modules(self) -> dict[str, nn.Module]:
        """The discriminators by name, as the doctor calls them."""
        names = {"adversary": "discriminator", "clip_adversary": "clip_discriminator"}
        return {names[role]: adversary.discriminator for role, adversary in self.adversaries.items()}

    def facts(self) -> dict[str, Tensor]:
        """Columns for the log of the step that has just been computed, scalars."""
        found: dict[str, Tensor] = {}
        for role, adversary in self.adversaries.items():
            prefix, terms = role.removesuffix("adversary"), adversary.terms
            found |= {f"{prefix}{COLUMNS[key]}": terms[key] for key in COLUMNS if key in terms}
            if "discriminator" in terms:
                found[f"{prefix}discriminator_loss"] = terms["discriminator"]
                found[f"{prefix}discriminator_accuracy"] = (terms["real_accuracy"] + terms["fake_accuracy"]) / 2
            adversary.terms = {}  # of a step that it takes no part in it says nothing
        return found

    def state_dict(self) -> dict[str, Any]:
        """Weights and statistics, for a checkpoint."""
        return {role: adversary.state_dict() for role, adversary in self.adversaries.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for role, adversary in self.adversaries.items():
            adversary.load_state_dict(state[role])


class Verdict(nn.Module):
    """The discriminators' loss as a forward pass, for Accelerate to wrap; their parameters are its own."""

    def __init__(self, judges: Judges, model: Any) -> None:
        super().__init__()
        self.adversaries = nn.ModuleDict(judges.adversaries)
        self._model = [model]  # in a list, so that its parameters are not this module's

    def forward(self, batch: dict[str, Any], step: int) -> Tensor:
        """A scalar, of a batch that the model's loss has seen."""
        return self._model[0].discriminator_loss(batch, step)


def check_judges(recipe: Recipe, judged: type | None) -> None:
    """Build a stage's judges and let them go, so that a mistake shows before anything is trained or written.

    `judged`: the class of the stage's model, None where it is not known yet. Raises as `Judges` and `Judges.attach` do,
    and ConfigError where a discriminator does not take pictures of `data.size`.
    """
    with torch.random.fork_rng():
        judges = Judges(recipe, 0, torch.device("cpu"))
    if judges and judged is not None and not hasattr(judged, "judge"):
        raise ConfigError(f"{judged.__name__} is not judged: drop perceptual and adversary from the recipe")
    side = recipe.data.size
    for role, adversary in judges.adversaries.items():
        sizes: Any = getattr(adversary.discriminator, "sizes", None)
        if sizes is not None and sizes.frames is None and not sizes.legal((side, side)):
            name = getattr(recipe, role).discriminator["name"]
            raise ConfigError(f"{role}: {name} judges {sizes.describe()}, and data.size is {side}")


def _build(section: AdversarySection, first: int) -> AdversarialLoss:
    name, options = section.discriminator["name"], {k: v for k, v in section.discriminator.items() if k != "name"}
    settings = section.model_dump(exclude={"discriminator", "optimizer", "start", "model_every"})
    return AdversarialLoss(build_discriminator(name, **options), start=first + section.start, **settings)
