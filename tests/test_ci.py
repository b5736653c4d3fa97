"""CI runs what everybody runs: system packages, `make check`, `make test`, and nothing that a fresh machine lacks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

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
