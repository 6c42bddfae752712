"""Golden numbers: a few numbers per stage of every tiny variant, with weights drawn by a rule that never changes.

They hold a clone that has no parity cases: whoever changes a number sees it here. `python -m tests.golden [SLUG ..]`
(`make golden`) writes `tests/golden/<slug>.json` anew; do that once parity has passed, and review the diff.

The rule: `numpy.random.RandomState(0)` draws, in the order of sorted names, every floating tensor of the state dict,
from a normal distribution divided by the square root of its fan-in. Vectors are 0.1 of one, around 1 where their
name ends in "weight"; variances and counts are made positive. Pictures come from `RandomState(1)`, captions from
`RandomState(2)`.
"""

import json
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok import catalogue, registry
from vistok.errors import InputError
from vistok.generator import Generator
from vistok.generators.titok import TiTokGenerator
from vistok.nn.clip_text import TextFeatures
from vistok.reducer import Context, Reducer
from vistok.tokenizer import Tokenizer

ROLES = ("tokenizer", "generator", "reducer")
FOLDER = Path(__file__).parent / "golden"
POSITIVE = ("running_var", "counts", "cluster_size", "embed_prob")
TOLERANCE = 5e-5  # of the standard deviation of what is compared, or of its largest value where that is more


def tiny_variants(slug: str) -> list[str]:
    """Names of the variants of a tokenizer, of the generator and of the reducer of that name that are small enough."""
    systems = [registry.find_system(slug, role) for role in registry.roles_of(slug) if role in ROLES]
    return [name for system in systems for name in system.variants if "tiny" in name.split("-")]


def slugs() -> list[str]:
    """Every tokenizer, generator and reducer of the package."""
    found = {slug for role in ROLES for slug in registry.systems(role)}
    return [slug for slug in sorted(found) if (catalogue.FOLDER / f"{slug}.yaml").exists()]


def measure(name: str) -> dict[str, Any]:
    """The golden numbers of one variant: of its encoder's output, its tokens and its pixels.

    Of a generator: its loss on random tokens, and what it generates. Of a reducer: what it makes of random tokens.
    """
    model = registry.create(name, dtype=torch.float32)
    draw_weights(model)
    if isinstance(model, Generator):
        return measure_generator(model)
    if isinstance(model, Reducer):
        return measure_reducer(model)
    pixels, conditions = inputs(model)
    stages: dict[str, Any] = {}

    def watch(stage: str) -> Any:
        return lambda module, args, output: stages.update(_tensors(stage, output))

    hooks = [getattr(model, stage).register_forward_hook(watch(stage)) for stage in ("encoder", "decoder")]
    tokens = model.encode(pixels)
    stages["tokens"] = tokens.data
    try:
        stages["pixels"] = model.decode(tokens, **conditions)
    except InputError:  # a first training stage, which predicts codes and not pixels
        with torch.no_grad():
            stages["logits"] = model.decoder.logits(model.embed(tokens))
    for hook in hooks:
        hook.remove()
    return {stage: describe(tensor) for stage, tensor in stages.items()}


@torch.no_grad()
def measure_reducer(model: Reducer) -> dict[str, Any]:
    """Random tokens reduced and restored, where they stood, and what the network says where there is one."""
    tokens = torch.from_numpy(np.random.RandomState(1).standard_normal((2, 40, 12))).float()
    reduced, state = model.reduce(tokens, Context(protected=1))
    found = {"tokens": reduced, "index": state.index, "restored": model.restore(reduced, state)}
    net: Any = model.network
    if net is not None:
        random = np.random.RandomState(1)
        found["logits"] = model(torch.from_numpy(random.rand(2, net.config.channels, *net.config.image)).float())
    return {name: describe(tensor) for name, tensor in found.items()}


@torch.no_grad()
def measure_generator(model: Generator) -> dict[str, Any]:
    """Loss terms on random tokens, in evaluation mode, and tokens for the first two classes (or for none)."""
    random = np.random.RandomState(1)
    columns = []
    for segment in model.spec.segments:
        if segment.dim:
            columns.append(torch.from_numpy(random.standard_normal((2, segment.count, segment.dim))).float())
        else:
            drawn = [random.randint(0, size, (2, segment.count)) for size in segment.codebooks]
            columns.append(torch.from_numpy(np.stack(drawn, -1)))
    data = torch.cat(columns, 1)
    labels = None if model.classes is None else torch.tensor([0, 1])
    codes = data[..., 0] if data.shape[-1] == 1 else data
    batch: dict[str, Any] = {"codes": codes, "label": labels}
    if getattr(model.config, "text", None):
        batch["text"] = torch.from_numpy(np.random.RandomState(2).standard_normal((2, *model.config.text))).float()
        if isinstance(model, TiTokGenerator):  # which reads a pooled vector too, and guides away from the empty text
            batch["text"] = TextFeatures(batch["text"], batch["text"].mean(1))
            model.attach_text(
                lambda texts: TextFeatures(torch.zeros(1, *model.config.text), torch.zeros(1, model.config.text[1]))
            )
    terms = model.loss(batch, 0, torch.Generator().manual_seed(0))
    tokens = model.generate(batch.get("text", labels), count=2, seed=0)
    return {"loss": describe(torch.stack(list(terms.values()))), "tokens": describe(tokens.data)}


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Set all floating weights and buffers by the rule of the module's docstring."""
    random = np.random.RandomState(0)
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name]
        if not tensor.is_floating_point():
            continue
        values = torch.from_numpy(random.standard_normal(tuple(tensor.shape)))
        if tensor.ndim >= 2:
            values /= prod(tensor.shape[1:]) ** 0.5
        else:
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        if name.endswith(POSITIVE):
            values = values.abs() + 1
        tensor.copy_(values)


def inputs(model: Tokenizer) -> tuple[Tensor, dict[str, Any]]:
    """Two pictures of the model's own size in [0, 1], and the conditions that it cannot decode without."""
    random = np.random.RandomState(1)
    shape = (2, model.input_channels, *model.spec.size)
    coarse = torch.from_numpy(random.random_sample((*shape[:2], 4, 4))).float()
    pixels = torch.nn.functional.interpolate(coarse, size=model.spec.size, mode="bilinear")
    conditions: dict[str, Any] = {}
    if "text" in model.spec.needs.decode:
        features = np.random.RandomState(2).standard_normal((2, *model.config.text))
        conditions["text"] = torch.from_numpy(features).float()
    return pixels, conditions


def describe(tensor: Tensor) -> dict[str, Any]:
    """Shape and first values; of floats also mean and standard deviation, of codes their sum."""
    flat = tensor.detach().flatten()
    plain: dict[str, Any] = {"shape": list(tensor.shape)}
    if not tensor.is_floating_point():
        return plain | {"first": flat[:16].tolist(), "sum": int(flat.sum())}
    values = flat.double()
    return plain | {
        "first": [float(f"{value:.7g}") for value in values[:8].tolist()],
        "mean": float(f"{values.mean():.7g}"),
        "std": float(f"{values.std():.7g}") if len(values) > 1 else 0.0,
    }


def compare(found: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """What differs between two sets of golden numbers, in words; nothing where they agree."""
    told = [f"{stage}: only in {'the file' if stage in known else 'the code'}" for stage in found.keys() ^ known.keys()]
    for stage in found.keys() & known.keys():
        ours, theirs = found[stage], known[stage]
        exact = [key for key in ("shape", "sum") if ours.get(key) != theirs.get(key)]
        told += [f"{stage}: {key} {ours.get(key)}, expected {theirs.get(key)}" for key in exact]
        scale = max([theirs.get("std", 0.0), *(abs(value) for value in theirs["first"])]) if "std" in theirs else 0.0
        pairs = list(zip(ours["first"], theirs["first"], strict=False))
        pairs += [(ours[key], theirs[key]) for key in ("mean", "std") if key in ours and key in theirs]
        off = max((abs(a - b) for a, b in pairs), default=0.0)
        if off > TOLERANCE * scale:
            told.append(f"{stage}: off by {off:.3g} where values are of size {scale:.3g}")
    return sorted(told)


def _tensors(stage: str, output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {stage: output}
    parts = output._asdict() if hasattr(output, "_asdict") else getattr(output, "__dict__", {})
    return {f"{stage}.{name}": part for name, part in parts.items() if isinstance(part, Tensor)}


def main(chosen: list[str]) -> None:
    """Write the files of the chosen systems, or of all."""
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for slug in chosen or slugs():
        numbers = {name: measure(name) for name in tiny_variants(slug)}
        if numbers:
            (FOLDER / f"{slug}.json").write_text(_text(numbers))
            print(f"{slug}: {len(numbers)} variants")


def _text(numbers: dict[str, Any]) -> str:
    """JSON with one line per stage, so that a diff shows what moved."""
    blocks = []
    for name, stages in numbers.items():
        lines = [f"    {json.dumps(stage)}: {json.dumps(values)}" for stage, values in stages.items()]
        blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
