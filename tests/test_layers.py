"""The layers of the house hold: a module imports from its own folder or from layers below, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "steel_megatron"
# From the bottom up. Parts of one layer do not know each other, but for the files within a folder.
LAYERS = (
    ("errors", "streams", "log", "config", "files", "signals", "events"),
    ("platform",),
    ("jobs",),
    ("data",),
    ("ops", "parallel"),
    ("model",),
    ("train",),
    ("hf",),
    ("generate", "audit", "report"),
    ("evaluation",),
    ("slurm",),
    ("cli",),
    ("__main__", "launch"),
)
# The same within data/.
ROOMS = (
    "strict_json",
    "native",
    "reading",
    "building",
    "tokenizing",
    "cleaning",
    "indexed",
    "preprocessing",
    "sampling",
    "ledger",
)
# At the bottom, everybody may use errors; the configuration and the log may not know each other.
SIBLINGS = {
    ("streams", "errors"),
    ("log", "streams"),
    ("log", "errors"),
    ("config", "errors"),
    ("files", "errors"),
    ("files", "log"),
    ("events", "log"),
}
# These travel in exported folders: they know nothing of the library.
SELF_CONTAINED = {"hf.configuration_steel", "hf.modeling_steel"}


def modules() -> dict[str, ast.Module]:
    """The package's modules by dotted name below the package, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The package's modules that a module imports, anywhere in it."""
    wanted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["steel_megatron", *name.split(".")[: -node.level], *([base] if base else [])])
            wanted |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    below = {full.removeprefix("steel_megatron.") for full in wanted if full.startswith("steel_megatron.")}
    return {module for module in below if module in known} - {name}


def layer(module: str) -> int:
    top = module.split(".")[0]
    for number, parts in enumerate(LAYERS):
        if top in parts:
            return number
    raise AssertionError(f"{module} belongs to no layer: put it into LAYERS")


MODULES = modules()
NAMES = set(MODULES) - {""}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_point_down(name: str) -> None:
    for other in imports(name, MODULES[name], NAMES):
        top, other_top = name.split(".")[0], other.split(".")[0]
        if top == other_top or (top, other_top) in SIBLINGS:
            continue
        assert layer(other) < layer(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name.startswith("data.")))
def test_rooms_of_data_import_to_the_left(name: str) -> None:
    room = ROOMS.index(name.split(".")[1])
    for other in imports(name, MODULES[name], NAMES):
        if other.startswith("data."):
            assert ROOMS.index(other.split(".")[1]) <= room, f"{name} imports {other}"


def test_no_circles() -> None:
    # A package's __init__ stands for what it exports; its own modules do not go through it.
    graph = {name: imports(name, MODULES[name], NAMES) - {name.rpartition(".")[0]} for name in NAMES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"circle of imports: {' -> '.join(error.args[1])}") from None


@pytest.mark.parametrize("name", sorted(SELF_CONTAINED))
def test_exported_code_stands_alone(name: str) -> None:
    assert imports(name, MODULES[name], NAMES) <= SELF_CONTAINED


def test_only_topology_asks_for_global_groups() -> None:
    users = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "parallel_state" for alias in node.names)
    }
    assert users == {"parallel.topology"}
