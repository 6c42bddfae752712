"""What is here of every system: code, parity, weights, recipes, reproduction. Read off the tree, never typed in.

Parity is a test of the repository (`tests/parity/test_<slug>.py`), which an installed wheel does not carry: there it is
None, "cannot be told from here". No torch is needed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from vistok import catalogue, registry

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Holdings:
    """One system: its roles, title and paper, and what of it is here.

    `code`: roles that have a file. `parity`: whether a parity test stands, None outside the repository. `weights`: how
    many checkpoints the catalogue names. `recipes`: names under `vistok/recipes/<slug>`. `reproduction`: None, "code",
    or the verdict in the result file beside it.
    """

    system: str
    roles: tuple[str, ...]
    title: str
    paper: str
    code: tuple[str, ...]
    parity: bool | None
    weights: int
    recipes: tuple[str, ...]
    reproduction: str | None


def holdings(package: Path = PACKAGE) -> list[Holdings]:
    """Every system of the catalogue, and every one that has code, sorted by slug."""
    entries = catalogue.entries()
    return [_holding(slug, entries.get(slug), package) for slug in sorted({*entries, *registry.systems()})]


def _holding(slug: str, entry: catalogue.Entry | None, package: Path) -> Holdings:
    module = slug.replace("-", "_")
    code = tuple(role for role, room in registry.ROOMS.items() if (package / room / f"{module}.py").exists())
    tests = package.parent / "tests" / "parity"
    return Holdings(
        system=slug,
        roles=entry.roles if entry else code,
        title=entry.title if entry else "",
        paper=entry.paper if entry else "",
        code=code,
        parity=(tests / f"test_{module}.py").exists() if tests.is_dir() else None,
        weights=sum(bool(variant.weights) for variant in entry.variants) if entry else 0,
        recipes=recipe_names(slug, package),
        reproduction=_reproduction(package / "reproductions" / module),
    )


def recipe_names(slug: str, package: Path = PACKAGE) -> tuple[str, ...]:
    """Names of a system's recipes (`tiny`, `paper`), sorted."""
    return tuple(sorted(path.stem for path in (package / "recipes" / slug).glob("*.yaml")))


def _reproduction(stem: Path) -> str | None:
    if not stem.with_suffix(".py").exists():
        return None
    result = stem.with_suffix(".json")
    return str(json.loads(result.read_text(encoding="utf-8")).get("verdict", "done")) if result.exists() else "code"
