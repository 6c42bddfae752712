"""Parity cases: folders that hold the authors' numbers, found by slug, and the comparison that holds ours to them.

    $VISTOK_PARITY/<slug>/<case>/  config.json  weights.safetensors  io.safetensors  README.md

A test is parametrised over the cases of the kinds it knows; `kind` in config.json decides, never the folder's name:

    @parametrize("titok", kinds=("vq",))
    def test_vq(case): ...

Where the folder is absent the test skips, except under VISTOK_REQUIRE_PARITY=1, where absence is a failure.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

DEFAULT = Path(__file__).resolve().parents[2].parent / "shared" / "parity"


def root() -> Path:
    """The folder of all cases: $VISTOK_PARITY, or `shared/parity` beside the repository."""
    return Path(os.environ.get("VISTOK_PARITY") or DEFAULT)


@dataclass(frozen=True)
class Case:
    """One folder of authors' numbers; its files are read when asked for."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def kind(self) -> str:
        return self.config["kind"]

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json: the options of the authors' module; `kind` says what sort of case it is."""
        return json.loads((self.path / "config.json").read_text())

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The authors' state dict, in their names; every `weights*.safetensors` merged, empty where there is none."""
        merged: dict[str, Tensor] = {}
        for file in sorted(self.path.glob("weights*.safetensors")):
            merged.update(load_file(file))
        return merged

    @cached_property
    def io(self) -> dict[str, Tensor]:
        """Inputs and the authors' outputs, losses and gradients."""
        return load_file(self.path / "io.safetensors")

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The content of another safetensors file of this case, by its name without suffix."""
        return load_file(self.path / f"{stem}.safetensors")


def cases(slug: str, kinds: Collection[str] | None = None) -> list[Case]:
    """Every case under `<slug>/`, sorted by name; with `kinds`, those whose config.json names one of them."""
    found = [Case(file.parent) for file in sorted((root() / slug).glob("*/config.json"))]
    return [case for case in found if kinds is None or case.config.get("kind") in kinds]


def parametrize(slug: str, kinds: Collection[str] | None = None) -> pytest.MarkDecorator:
    """Run a test, whose argument is named `case`, once per case of `slug` (of these kinds)."""
    found = cases(slug, kinds)
    if found:
        return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in found])
    wanted = f"{root() / slug}" + (f" of kind {', '.join(sorted(kinds))}" if kinds else "")
    reason = f"no parity cases in {wanted}"
    if os.environ.get("VISTOK_REQUIRE_PARITY") == "1":
        return pytest.mark.parametrize("case", [pytest.param(Absent(Path(reason)), id="absent")])
    return pytest.mark.parametrize("case", [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))])


class Absent(Case):
    """Stands where cases are required and none are there: fails the test that looks into it."""

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        pytest.fail(f"{self.path}, and VISTOK_REQUIRE_PARITY=1 requires them")


def assert_close(
    actual: Tensor, expected: Tensor, rtol_of_scale: float = 2e-5, name: str = "", scale: float | None = None
) -> None:
    """Integers and booleans must be equal; floats agree within `rtol_of_scale` of the expected tensor's largest value.

    `scale` replaces that largest value where the reference is a difference of larger numbers.
    """
    label = name or "tensor"
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if not expected.is_floating_point():
        assert not actual.is_floating_point(), f"{label}: {actual.dtype}, expected integers"
        wrong = int((actual.long() != expected.long()).sum())
        assert wrong == 0, f"{label}: {wrong} of {expected.numel()} integers differ"
        return
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    size = max(expected.double().abs().max().item() if scale is None else scale, 1e-9)
    assert error <= rtol_of_scale * size, f"{label}: off by {error / size:.2e} of its scale {size:.3g}"


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol_of_scale: float = 2e-5) -> None:
    """`assert_close` for every name in `actual`, against the tensor of that name in `expected`."""
    for name, tensor in actual.items():
        assert name in expected, f"{name}: not among the expected {sorted(expected)}"
        assert_close(tensor, expected[name], rtol_of_scale, name)
