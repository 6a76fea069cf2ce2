"""The rules of the house that a machine can see: imports go one way, files are short, public names are documented."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "rapm").rglob("*.py")
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
FILES = [path for folder in ("rapm", "kernels", "tests", "benchmarks", "csrc") for path in (ROOT / folder).rglob("*")]
CODE = sorted(path for path in FILES if path.suffix in (".py", ".cpp", ".css") and "build" not in path.parts)


def imports(node: ast.AST) -> Iterator[str]:
    """The modules of ours that are imported in a file, wherever in it; not those that only type checkers see."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for child in node.orelse:
            yield from imports(child)
        return
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names if name.name in SOURCES)
    if isinstance(node, ast.ImportFrom) and node.module:
        for name in node.names:
            inner = f"{node.module}.{name.name}"
            yield from [inner if inner in SOURCES else node.module] * (node.module.partition(".")[0] == "rapm")
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (visit(other, [*way, name]) for other in sorted(graph.get(name, ())))), [])
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
    late = ast.parse(
        "if TYPE_CHECKING:\n from rapm.train import train\ndef f():\n from rapm import cli\n import rapm.step"
    )
    assert [*imports(late)] == ["rapm.cli", "rapm.step"]


def test_no_circle_of_imports():
    """Not even one that closes inside a function."""
    found = circle({name: {*imports(tree)} - {name} for name, tree in TREES.items()})
    assert not found, " -> ".join(found)


def test_no_file_is_too_long():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert len(lengths) > 100 and not {path: n for path, n in lengths.items() if n > 500}


def undocumented(tree: ast.AST, inside: str = "") -> Iterator[str]:
    """Public functions, classes and methods without a docstring; a network's `forward` is what its class says."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and node.name != "forward":
                yield inside + node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node, f"{node.name}.")


def test_public_names_are_documented():
    found = {name: list(undocumented(tree)) for name, tree in TREES.items()}
    assert not {name: names for name, names in found.items() if names}
