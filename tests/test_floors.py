"""Imports go down the floors of docs/architecture.md, read off the source without importing anything."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "vistok"
ROOMS = {
    **dict.fromkeys(("cli", "app"), 6),
    **dict.fromkeys(("training", "evaluation", "scale", "reproductions"), 5),
    **dict.fromkeys(("data", "metrics"), 4),
    **dict.fromkeys(("tokenizers", "generators", "reducers"), 3),
    **dict.fromkeys(("quantize", "losses", "sampling"), 1),
    "nn": 0,
}
DOORS = {"__init__", "__main__", "loading"}
GENERAL = {"errors", "files", "bits", "config", "processes", "tensorfile", "pickles", "keys", "extras", "environment"}
LAZY = {("pairing", "loading")}  # a generator's tokenizer, loaded by name when it is asked for


def floor(name: str) -> int:
    """The floor of a room, or of a file of the package itself."""
    if name in ROOMS:
        return ROOMS[name]
    return 6 if name in DOORS else 0 if name in GENERAL or name == "upright" else 2


def imported(tree: ast.Module) -> set[str]:
    """Rooms and files of vistok that a module imports, within functions too, but not for type checkers alone."""
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in checked for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "vistok":
            found |= {alias.name for alias in node.names if _is_part(alias.name)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vistok."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vistok.")}
    return found


def _is_part(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


def test_imports_go_down():
    climbing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        mine = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for theirs in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if floor(theirs) > floor(mine) and (mine, theirs) not in LAZY:
                climbing.append(f"{path.relative_to(PACKAGE)} (floor {floor(mine)}) imports {theirs} ({floor(theirs)})")
    assert not climbing, "\n".join(climbing)


def test_what_climbs_is_seen():
    tree = ast.parse(
        "import vistok.data.items\nfrom vistok import loading, load\ndef f():\n    from vistok.cli import x"
    )
    assert imported(tree) == {"data", "loading", "cli"}
    assert imported(ast.parse("if TYPE_CHECKING:\n    from vistok.data.items import Item")) == set()
    assert floor("data") > floor("nn") == floor("keys") < floor("losses") < floor("tokens") < floor("tokenizers")
