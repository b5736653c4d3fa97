"""Every public part of the package says what it is, and every longer list of arguments what each of them is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "steel_megatron"
# Arguments that need no section: what two of them are, a sentence says.
FEW = 2

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(body: list[ast.stmt], inside: tuple[Definition, ...] = ()) -> Iterator[tuple[Definition, ...]]:
    """Classes and functions, each after the classes that it is in; functions within functions do not count."""
    for node in body:
        if isinstance(node, Definition):
            yield (*inside, node)
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, (*inside, node))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from definitions([part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)], inside)


def base_names(cls: ast.ClassDef) -> list[str]:
    """The last part of each base's name: Protocol of typing.Protocol[T]."""
    found = []
    for base in cls.bases:
        named = base.value if isinstance(base, ast.Subscript) else base
        found.append(named.attr if isinstance(named, ast.Attribute) else ast.unparse(named))
    return found


def inherits(cls: ast.ClassDef, method: str, classes: dict[str, list[ast.ClassDef]]) -> bool:
    """Whether a method may be explained by what it overrides: in a base that documents it, or a library's."""
    for name in base_names(cls):
        if name in ("ABC", "Protocol", "Generic", "NamedTuple"):
            continue
        if name not in classes or name == cls.name:
            return True
        for base in classes[name]:
            own = [node for node in base.body if isinstance(node, Definition) and node.name == method]
            if any(ast.get_docstring(node) for node in own) or inherits(base, method, classes):
                return True
    return False


def has_many_arguments(node: Definition) -> bool:
    """More than FEW; self, cls, ``*args`` and ``**kwargs`` do not count."""
    if isinstance(node, ast.ClassDef):
        return False
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in given if argument.arg not in ("self", "cls")]) > FEW


def lacking(sources: dict[str, str]) -> tuple[list[str], list[str]]:
    """Of files by name: what has no docstring, and what has more than FEW arguments but no Args in its docstring."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    found = [(name, path) for name, tree in trees.items() for path in definitions(tree.body)]
    classes: dict[str, list[ast.ClassDef]] = {}  # several may have one name
    for _, path in found:
        if isinstance(path[-1], ast.ClassDef):
            classes.setdefault(path[-1].name, []).append(path[-1])
    silent = [name for name, tree in trees.items() if not ast.get_docstring(tree)]
    unexplained = []
    for name, path in found:
        *around, node = path
        place = f"{name}: {'.'.join(part.name for part in path)}"
        documented = ast.get_docstring(node, clean=False) or ""
        is_public = not any(part.name.startswith("_") for part in path)
        overrides = bool(around) and isinstance(around[-1], ast.ClassDef) and inherits(around[-1], node.name, classes)
        if is_public and not documented and not overrides:
            silent.append(place)
        # Methods of private classes too: their arguments need no less explanation.
        if not node.name.startswith("_") and has_many_arguments(node) and "Args:" not in documented:
            unexplained.append(place)
    return silent, unexplained


@pytest.fixture(scope="module")
def package() -> tuple[list[str], list[str]]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    return lacking({str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in files})


def test_every_public_part_has_a_docstring(package: tuple[list[str], list[str]]) -> None:
    assert package[0] == []


def test_functions_of_more_than_two_arguments_explain_them(package: tuple[list[str], list[str]]) -> None:
    assert package[1] == []


def test_what_counts() -> None:
    source = '''
class Base:
    """Says what it is."""
    def told(self): "Documented here."
    def untold(self): ...
    def two(self, a, *args, b=0, **kwargs): "A sentence will do."
    def three(self, a, b, *, c): "No section."
    def explained(self, a, b, c):
        """With a section.

        Args:
            a, b, c: numbers.
        """
        def inner(a, b, c): ...
class Derived(Base):
    """Overrides."""
    def told(self): ...
    def untold(self): ...
    def three(self, a, b, c): ...
class Module(nn.Module):
    """A library's base."""
    def forward(self, x): ...
class Interface(typing.Protocol[T]):
    """No base to inherit from."""
    def ask(self): ...
class _Private:
    def silent(self): ...
    def three(self, a, b, c): ...
if True:
    class Bare: ...
    async def bare(): ...
def _private(a, b, c): ...
'''
    silent, unexplained = lacking({"m.py": source})
    assert silent == [
        "m.py",
        *(f"m.py: {name}" for name in ("Base.untold", "Derived.untold", "Interface.ask", "Bare", "bare")),
    ]
    assert unexplained == [f"m.py: {name}.three" for name in ("Base", "Derived", "_Private")]
