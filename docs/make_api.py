"""Write docs/api.md from the docstrings: `python docs/make_api.py` (`--check` says whether it is up to date).

Read from the source, without importing it, so that it needs nothing installed.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
MODULES = [  # in the order in which a user meets them
    *("tokenizer", "tokens", "layout", "registry", "catalogue", "hub", "model", "pixels", "compressed", "prior"),
    *("checkpoints", "keys", "errors", "files", "bits"),
    *("quantize.*", "nn.*", "losses.*", "tokenizers.*", "data.*", "metrics.*", "training.*", "evaluation.*", "scale.*"),
]


def files(pattern: str) -> list[Path]:
    """Source files behind an entry of MODULES, private ones left out."""
    base = ROOT / "vistok"
    if pattern.endswith(".*"):
        return [p for p in sorted((base / pattern[:-2]).glob("*.py")) if not p.stem.startswith("_")]
    path = base / f"{pattern}.py"
    return [path] if path.exists() else []


def signature(node: ast.FunctionDef, drop_self: bool) -> str:
    """`name(arguments) -> type` as written."""
    arguments = ast.unparse(node.args)
    if drop_self:
        arguments = arguments.partition(", ")[2] if ", " in arguments else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments}){returns}"


def is_static(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)


def is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(d) for d in node.decorator_list)


def entry(title: str, node: ast.AST, level: str) -> list[str]:
    """A heading and a docstring; nothing for what has none."""
    text = ast.get_docstring(node)  # type: ignore[arg-type]
    return [f"{level} `{title}`", "", text, ""] if text else []


def describe(path: Path) -> list[str]:
    """The page's part for one module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    text = ast.get_docstring(tree) or ""
    head, _, rest = text.partition("\n")
    lines = [f"## {name}", "", head, ""]
    if rest.strip():
        lines += ["```text", rest.strip("\n"), "```", ""]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            lines += entry(signature(node, drop_self=False), node, "###")
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            lines += entry(f"class {node.name}({bases})" if bases else f"class {node.name}", node, "###")
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    shown = method.name if is_property(method) else signature(method, not is_static(method))
                    lines += entry(f"{node.name}.{shown}", method, "####")
    return lines


def page() -> str:
    """The whole reference."""
    lines = ["# API reference", "", "Made from the docstrings by `python docs/make_api.py`.", ""]
    for pattern in MODULES:
        for path in files(pattern):
            if path.stem != "__init__":
                lines += describe(path)
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


if __name__ == "__main__":
    wanted = page()
    if "--check" in sys.argv:
        sys.exit(
            0
            if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted
            else "docs/api.md is out of date: make docs"
        )
    PAGE.write_text(wanted, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {wanted.count(chr(10))} lines")
