"""Recipes: YAML files that train one system at one scale, checked before anything is built.

    version: 1
    model:     {name: titok-tiny, <field of its config>: ...}
    data:      {size: 64, crop: random, flip: true}
    loss:      {<term that the model's loss returns>: weight}
    optimizer: {name: adamw, lr: 1e-3, warmup: 100, schedule: cosine}
    train:     {steps: 2000, batch_size: 64}
    perceptual: {name: steerable}
    adversary: {discriminator: {name: patchgan}, start: 1000, optimizer: {lr: 4e-5}}
    stages:    [{name: decoder, freeze: [encoder, quantizer], optimizer: {lr: 1e-4}, train: {steps: 500}}]

A key that does not exist is an error that names the nearest one; so are values that cannot be meant.
"""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vistok.errors import ConfigError, UnknownNameError, nearest
from vistok.inventory import PACKAGE

VERSION = 1
FOLDER = PACKAGE / "recipes"

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Base of the sections: no unknown keys, no NaN or infinity, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """`name` of the variant to create, or `init`: a name or folder whose weights training starts from.

    `tokenizer`: of a generator, the name or folder of the tokenizer whose tokens it learns. `start_from`: an earlier
    stage, whose weights are taken where names and shapes agree. Every other key is a field of the variant's config.
    """

    model_config = ConfigDict(extra="allow")
    name: str | None = None
    init: str | None = None
    tokenizer: str | None = None
    start_from: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.name is None) == (self.init is None):
            raise ValueError("give either name (a fresh model) or init (weights to start from)")
        if self.init is not None and self.model_extra:
            raise ValueError(f"a model that starts from init has its own config; drop {', '.join(self.model_extra)}")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the variant's config that the recipe sets."""
        return dict(self.model_extra or {})


class DataSection(Section):
    """What a batch is cut from: square crops of `size` pixels.

    flip: mirror half of them; turn: turn them by quarter turns, for tokenizers that should not mind.
    validation: a path, or how many pictures of the data to hold out (evenly spread, at most a tenth of them).
    frames: of clips, which the data then are; with `clips`, a folder of them, the data are pictures, and steps take
    pictures and clips in turn, `clip_batch` of them (train.batch_size unless set).
    """

    size: Count
    crop: Literal["random", "center"] = "random"
    flip: bool = True
    turn: bool = False
    scale: tuple[Part, Part] | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    validation: Annotated[int, Field(ge=0)] | str = 64
    frames: Count | None = None
    clips: str | None = None
    clip_batch: Count | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is (low, high), got {self.scale}")
        if self.frames is None and (self.clips is not None or self.clip_batch is not None):
            raise ValueError("clips and clip_batch need frames, how many a clip has")
        return self


class OptimizerSection(Section):
    """Adam with decoupled weight decay (on matrices and kernels, not on biases, scales and other vectors).

    warmup: steps of linear rise. schedule: "constant", or "cosine" or "linear" down to `final` times lr. clip: largest
    norm of the gradient over all parameters, null for none.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0


class PerceptualSection(Section):
    """What is added for how a reconstruction looks: `name` and `weights` of `vistok.losses.perceptual`, and options.

    Its weight in the loss is `loss.perceptual`, 1 unless set.
    """

    model_config = ConfigDict(extra="allow")
    name: str
    weights: str | list[str] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What is passed on to the distance."""
        return dict(self.model_extra or {})


class AdversarySection(Section):
    """A discriminator that is trained beside the model, and how much it counts.

    discriminator: `name` and options of `vistok.losses.discriminators`. start: step of its stage from which it acts.
    model_every: from then on the model takes its turn in one step of so many, the discriminators theirs in the others;
    1 is both in every step. optimizer: what differs from the model's optimizer. The rest is as in
    `vistok.losses.adversarial.AdversarialLoss`.
    """

    discriminator: dict[str, Any]
    kind: str = "hinge"
    start: Annotated[int, Field(ge=0)] = 0
    model_every: Count = 1
    weight: Annotated[float, Field(ge=0)] = 0.8
    adaptive: bool = True
    scales_both: bool = False
    limit: Annotated[float, Field(gt=0)] = 1e4
    lecam: Annotated[float, Field(gt=0)] | None = None
    lecam_decay: Share = 0.999
    penalty: Annotated[float, Field(gt=0)] | None = None
    penalty_every: Count = 16
    optimizer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not isinstance(self.discriminator.get("name"), str):
            raise ValueError("discriminator needs a name, such as {name: patchgan}")
        return self


class TrainSection(Section):
    """The run. batch_size is the global batch, over all processes; `..._every` count steps, 0 is never.

    accumulate: parts that a process splits its share of the batch into. ema: decay, null for none. threads: of the
    CPU, null for torch's choice (small nets are fastest with 1). compile: the model's parts by torch.compile.
    fsdp: weights, gradients and moments in shards, one for each process, for models too large for one card.
    activation_checkpointing: what blocks compute is computed again in the backward pass instead of kept. best: column
    of validation.csv by which RUN/best is chosen, null for none.
    """

    steps: Count
    batch_size: Count
    accumulate: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ema: Share | None = 0.999
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    fsdp: bool = False
    best: str | None = None
    threads: Count | None = None
    log_every: Count = 10
    checkpoint_every: Annotated[int, Field(ge=0)] = 1000
    sample_every: Annotated[int, Field(ge=0)] = 1000
    validate_every: Annotated[int, Field(ge=0)] = 1000
    tensorboard: bool = True


# younger than runs and reference curves that are about: left out where they are as they were before they came
OPTIONAL = {
    "model": {"tokenizer": None, "start_from": None},
    "data": {"frames": None, "clips": None, "clip_batch": None},
    "train": {"compile": False, "activation_checkpointing": False, "fsdp": False, "best": None},
    "teachers": {},
    "perceptual": None,
    "adversary": None,
    "clip_adversary": None,
}
STAGE_TRAIN_KEYS = ("steps", "batch_size", "accumulate")
STAGE_SECTIONS = ("model", "teachers", "perceptual", "adversary", "clip_adversary")  # which a stage replaces whole


class StageSection(Section):
    """What a stage changes. freeze: parameters or modules by name or shell pattern, held fixed while it runs.

    model: another model than the recipe's, which is trained in this stage; later stages use it by the stage's name.
    teachers: role -> an earlier stage, a name or a folder: models that this stage's model learns from. perceptual,
    adversary, clip_adversary: sections of their own; null turns off what the recipe has.
    """

    name: str
    freeze: tuple[str, ...] = ()
    model: dict[str, Any] | None = None
    data: dict[str, Any] = {}
    loss: dict[str, float] = {}
    optimizer: dict[str, Any] = {}
    train: dict[str, Any] = {}
    teachers: dict[str, str] | None = None
    perceptual: dict[str, Any] | None = None
    adversary: dict[str, Any] | None = None
    clip_adversary: dict[str, Any] | None = None


class Recipe(Section):
    """A whole recipe; see the module's docstring and the sections."""

    version: int = VERSION
    model: ModelSection
    data: DataSection
    loss: dict[str, Annotated[float, Field(ge=0)]] = {}
    optimizer: OptimizerSection
    train: TrainSection
    teachers: dict[str, str] = {}
    perceptual: PerceptualSection | None = None
    adversary: AdversarySection | None = None
    clip_adversary: AdversarySection | None = None
    stages: tuple[StageSection, ...] = ()

    def resolved(self) -> list[tuple[StageSection, "Recipe"]]:
        """The stages in order, each with the recipe that holds while it runs; one stage where none is listed."""
        if not self.stages:
            return [(StageSection(name="main"), self)]
        base = self.model_dump(exclude={"stages"})
        found: list[tuple[StageSection, Recipe]] = []
        for index, stage in enumerate(self.stages):
            for key in stage.train:
                if key not in STAGE_TRAIN_KEYS:
                    raise ConfigError(f"stages.{index}.train.{key}: a stage sets {', '.join(STAGE_TRAIN_KEYS)} alone")
            changes = stage.model_dump(include={"data", "loss", "optimizer", "train"})
            merged = base | {section: base[section] | values for section, values in changes.items()}
            merged |= {key: getattr(stage, key) for key in STAGE_SECTIONS if key in stage.model_fields_set}
            merged["teachers"] = merged["teachers"] or {}
            held = check(merged, f"stages.{index}")
            earlier = [one.name for one, _ in found]
            if stage.name in earlier:
                raise ConfigError(f"stages.{index}.name: {stage.name!r} is the name of an earlier stage")
            source = held.model.start_from
            if source is not None and source not in earlier:
                raise ConfigError(
                    f"stages.{index}.model.start_from: no earlier stage {source!r}{nearest(source, earlier)}"
                )
            found.append((stage, held))
        return found

    def adversary_optimizer(self, section: AdversarySection) -> OptimizerSection:
        """The optimizer of a discriminator: the model's, with what its section changes. Raises ConfigError."""
        try:
            return OptimizerSection.model_validate(self.optimizer.model_dump() | section.optimizer)
        except ValidationError as error:
            raise ConfigError(f"adversary.optimizer: {_told(error.errors()[0])}") from error

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(recipe.train.steps for _, recipe in self.resolved())

    def plain(self) -> dict[str, Any]:
        """As YAML and JSON hold it: every setting, but for those of OPTIONAL that are at their defaults."""
        return _without_defaults(self.model_dump(mode="json"))


def load_recipe(where: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by name (`strata/tiny`) or path, with `section.key=value` overrides laid over it.

    Raises UnknownNameError for a recipe that does not exist, ConfigError for keys and values that do not fit.
    """
    path = find(where)
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections: {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _lay_over(plain, override)
    recipe = check(plain, str(where))
    recipe.resolved()
    return recipe


def find(where: str | Path) -> Path:
    """The file behind a recipe's name or path. Raises UnknownNameError that names the nearest ones."""
    path = Path(where)
    if path.is_file():
        return path
    named = FOLDER / f"{where}.yaml"
    if path.suffix not in (".yaml", ".yml") and not path.is_absolute() and ".." not in path.parts and named.is_file():
        return named
    known = sorted(found.relative_to(FOLDER).with_suffix("").as_posix() for found in FOLDER.glob("*/*.yaml"))
    hint = nearest(str(where), known) or f"; a recipe is a YAML file or one of: {', '.join(known)}"
    raise UnknownNameError(f"no recipe {str(where)!r}{hint}")


def check(plain: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain values. Raises ConfigError: the key, what was wrong, and the nearest key that exists."""
    version = plain.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise ConfigError(f"{where}: version {version} is newer than this vistok reads ({VERSION}); upgrade vistok")
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise ConfigError(f"{where}: {_told(first)}") from error


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Keys whose values differ between two plain recipes, one line each."""
    first, second = _flat(there), _flat(here)
    return [
        f"{key} is {first.get(key, 'not set')} there and {second.get(key, 'not set')} here"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


def _without_defaults(plain: dict[str, Any]) -> dict[str, Any]:
    found = {key: _young(key, value) for key, value in plain.items()}
    for key, default in OPTIONAL.items():
        if isinstance(default, dict) and default and isinstance(found.get(key), dict):
            found[key] = {k: v for k, v in found[key].items() if k not in default or v != default[k]}
        elif key in found and found[key] == default:
            del found[key]
    if "stages" in found:
        found["stages"] = [
            {k: _young(k, v) for k, v in stage.items() if k not in STAGE_SECTIONS or v is not None}
            for stage in found["stages"]
        ]
    return found


def _young(section: str, settings: Any) -> Any:
    """A section without what is younger than runs that are about, where it is as it was before."""
    if section not in ("adversary", "clip_adversary") or not isinstance(settings, dict):
        return settings
    return {name: value for name, value in settings.items() if (name, value) != ("model_every", 1)}


def _lay_over(plain: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is section.key=value, such as train.steps=100")
    *sections, last = key.split(".")
    inner: Any = plain
    for section in sections:
        inner = inner[int(section)] if isinstance(inner, list) and section.isdigit() else _inside(inner, section, key)
    if not isinstance(inner, dict):
        raise ConfigError(f"{key}: there is nothing to set inside {'.'.join(sections)}")
    try:
        inner[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: cannot read the value {text!r}") from error


def _inside(inner: Any, section: str, key: str) -> Any:
    if not isinstance(inner, dict):
        raise ConfigError(f"{key}: {section!r} is not a section")
    if inner.get(section) is None:
        inner[section] = {}
    return inner[section]


def _told(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _keys(path[:-1])
        elsewhere = [f"{name}.{path[-1]}" for name in Recipe.model_fields if path[-1] in _keys([name])]
        hint = nearest(path[-1], known)
        if not hint:
            hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known: {', '.join(known)}"
        return f"unknown key {key!r}{hint}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    shown = "" if isinstance(given, (dict, ModelSection)) else f", got {given!r}"
    return f"{key}: {message[:1].lower()}{message[1:]}{shown}"


def _keys(path: list[str]) -> list[str]:
    """Keys that exist at a place of the recipe."""
    cls: Any = Recipe
    for part in path:
        if part.isdigit():
            continue
        field = cls.model_fields.get(part) if hasattr(cls, "model_fields") else None
        cls = _section_class(field.annotation) if field else None
    return list(getattr(cls, "model_fields", {}))


def _section_class(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, UnionType) or get_args(annotation):
        return next(filter(None, (_section_class(inner) for inner in get_args(annotation))), None)
    return None


def _flat(plain: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(plain, dict) and plain:
        return {k: v for key, inner in plain.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): plain}
