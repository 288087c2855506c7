"""What docs/architecture.md says of imports, read off the sources: who imports whom, and what needs no torch."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import zero_ckpt

ROOT = Path(zero_ckpt.__file__).parent

BELOW = {
    "errors": set[str](),
    "core": {"errors"},
    "fp32": {"core", "errors"},
    "zero": {"core", "errors"},
    "testing": {"core", "errors"},
    "checkpointer": {"core", "errors"},
    "calls": {"checkpointer", "core", "errors"},
    "interop": {"core", "errors", "fp32"},
    "cli": {"core", "errors", "fp32", "interop"},
    "accelerate": {"core", "errors", "fp32", "zero"},
    "lightning": {"core", "errors", "fp32", "zero"},
}
"""Package or module -> what it may import beside itself. What a layer does not need is not in its row, either."""


def name_of(path: Path) -> str:
    parts = ["zero_ckpt", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

TORCHLESS = [
    name for name, tree in MODULES.items() if "mports no torch" in (ast.get_docstring(tree) or "")
]


def named(statement: ast.stmt) -> list[str]:
    """The modules that an import statement names; none for any other statement."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if not isinstance(statement, ast.ImportFrom) or statement.module is None:
        return []
    below = [f"{statement.module}.{alias.name}" for alias in statement.names]
    return [statement.module, *(name for name in below if name in MODULES)]


@cache
def imported(module: str) -> frozenset[str]:
    """All that importing `module` imports, as far as it is ours, and the packages of others."""
    found: set[str] = set()
    pending = [module]
    while pending:
        for statement in MODULES[pending.pop()].body:
            new = set(named(statement)) - found
            found |= new
            pending += new & MODULES.keys()
    return frozenset(found)


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_imports_only_what_lies_below_it(layer: str) -> None:
    for module, tree in MODULES.items():
        if f"{module}.".startswith(f"zero_ckpt.{layer}."):
            names = [name for node in ast.walk(tree) for name in named(node)]  # type: ignore[arg-type]
            ours = {name.split(".")[1] for name in names if name.startswith("zero_ckpt.")}
            assert ours <= BELOW[layer] | {layer}, module


def test_every_layer_is_looked_at() -> None:
    there = {name.split(".")[1] for name in MODULES if "." in name}
    assert there == BELOW.keys() | {"__main__"}


@pytest.mark.parametrize("module", TORCHLESS)
def test_a_module_that_says_so_imports_no_torch(module: str) -> None:
    assert "torch" not in {name.partition(".")[0] for name in imported(module)}
