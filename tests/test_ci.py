"""CI runs what everybody runs: system packages, `make check`, `make test`, and nothing that a fresh machine lacks."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
RUN = (ROOT / ".ci/run").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of .ci/run that run something, without comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in RUN.splitlines())
    return [line for line in lines if line]


def test_ci_installs_no_python_package() -> None:
    for line in commands():
        assert not re.search(r"\b(pip3?|uv|pipx|poetry|conda|mamba|easy_install)\b", line), line
        assert ".venv" not in line and "setup.py" not in line, line


def test_ci_ends_with_the_two_commands() -> None:
    assert commands()[-2:] == ["make check", "make test"]
    assert [line for line in commands() if line.startswith("make")] == ["make check", "make test"]


def test_a_second_run_sets_nothing_up(tmp_path: Path) -> None:
    """Where .venv is up to date, `make test` starts pytest at once: no pip, no compiler."""
    ready = tmp_path / ".ready"
    ready.touch()
    done = subprocess.run(
        ["make", "--dry-run", "test", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make[")]
    assert len(lines) == 1 and " -m pytest" in lines[0], done.stdout


def lowest(pyproject: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, ".ci/lowest_versions.py", str(pyproject)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(text) for group in groups for text in group]
    return [one for one in found if one.name != project["name"]]


def test_constraints_are_the_lowest_versions(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    project = """
        [project]
        name = "own-name"
        dependencies = ["Some_Thing[x,y] >= 1.2.3, <2", "compatible~=0.4", "exact==5.0rc1"]
        [project.optional-dependencies]
        a = ["own_name[b]", "compatible~=0.4", "here>=3; sys_platform == 'linux' and python_version >= '3.11'"]
        b = ["under<9,>=8.1,!=8.2"]
    """
    path.write_text(project)
    done = lowest(path)
    assert done.stdout.splitlines() == [
        "compatible==0.4",
        "exact==5.0rc1",
        "here==3; sys_platform == 'linux' and python_version >= '3.11'",
        "some-thing==1.2.3",
        "under==8.1",
    ]
    for wrong in ("free", "below<3", "compatible>=0.5", "twice>=1,>=2"):
        path.write_text(project.replace('"exact==5.0rc1"', f'"{wrong}"'))
        done = lowest(path)
        assert done.returncode == 1 and done.stdout == "" and f"'{wrong}'" in done.stderr, wrong


def test_every_dependency_has_a_range_that_holds_what_is_installed() -> None:
    constraints = {Requirement(line).name: line for line in lowest(ROOT / "pyproject.toml").stdout.splitlines()}
    for one in requirements():
        pinned = Requirement(constraints[re.sub(r"[-_.]+", "-", one.name).lower()])
        assert one.specifier.contains(str(pinned.specifier).removeprefix("==")), one
        try:
            installed = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert one.specifier.contains(installed), f"{one}: {installed} is installed"


@pytest.mark.parametrize(("name", "refused"), [("torch", "2.9.1"), ("sentencepiece", "0.2.0")])
def test_versions_with_known_holes_are_refused(name: str, refused: str) -> None:
    specifier = next(one.specifier for one in requirements() if one.name == name)
    assert not specifier.contains(refused)


def test_the_lowest_versions_are_tested() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert "make test-lowest" in [step.get("run") for step in jobs["lowest-versions"]["steps"]]
    done = subprocess.run(["make", "--dry-run", "test-lowest"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "lowest_versions.py pyproject.toml > lowest.txt" in done.stdout
    assert f'PIP_CONSTRAINT="{ROOT}/lowest.txt"' in done.stdout and ".venv-lowest/bin/python -m pytest" in done.stdout
