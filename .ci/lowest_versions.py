"""Constraints for pip that pin every dependency in pyproject.toml to the lowest version of its range.

    python3.11 .ci/lowest_versions.py pyproject.toml > lowest.txt

It needs nothing but Python, as it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(?:\[(?P<extras>[^]]*)\])?\s*(?P<range>[^;]*)(?P<marker>;.*)?")
_LOWEST = re.compile(r"(?:>=|==|~=)\s*([0-9][0-9A-Za-z.]*)")


def lowest_versions(pyproject: str) -> list[str]:
    """One line for each dependency of a project and of its extras, such as ``numpy==1.26``.

    Args:
        pyproject: content of pyproject.toml.

    Returns:
        the lines, sorted; one of a platform keeps its marker.

    Raises:
        ValueError: a dependency has no lower bound, or two different ones.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = project.get("optional-dependencies", {})
    found: dict[str, tuple[str, str]] = {}
    for requirement in [*project.get("dependencies", []), *(one for group in extras.values() for one in group)]:
        parts = _REQUIREMENT.fullmatch(requirement.strip())
        name = _normal(parts["name"]) if parts else ""
        if name == _normal(project["name"]):  # its own extras
            continue
        bounds = _LOWEST.findall(parts["range"]) if parts else []
        if len(bounds) != 1:
            raise ValueError(f"{requirement!r} must have one lower bound, as in {name or 'name'}>=1.0")
        pinned = bounds[0], (parts["marker"] or "") if parts else ""
        if found.setdefault(name, pinned) != pinned:
            raise ValueError(f"{requirement!r} differs from {name}{'=='.join(('', found[name][0]))} elsewhere")
    return [f"{name}=={version}{marker}" for name, (version, marker) in sorted(found.items())]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    try:
        sys.stdout.write("\n".join(lowest_versions(Path(sys.argv[1]).read_text(encoding="utf-8"))) + "\n")
    except ValueError as error:
        sys.exit(f"error: {sys.argv[1]}: {error}")
