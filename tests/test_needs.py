"""A test is skipped only through tests/needs.py, and a run says what would bring it back."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs

ROOT = Path(__file__).resolve().parents[1]
SKIPPING = {"skip", "skipif", "importorskip", "skipTest", "SkipTest", "xfail", "Skipped"}


def skipping(source: str) -> list[int]:
    """The lines that skip a test, by whatever name they know pytest or unittest."""
    lines: list[int] = []
    if not any(name in source for name in SKIPPING):  # parsing takes longer
        return lines
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pytest", "_pytest", "unittest"):
            names = {alias.name for alias in node.names}
        else:
            names = {node.attr} if isinstance(node, ast.Attribute) else set()
        lines += [node.lineno] if names & SKIPPING else []  # type: ignore[attr-defined]
    return lines


def test_tests_are_skipped_only_for_a_need() -> None:
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "needs.py"]
    assert len(files) > 70
    found = {str(path.relative_to(ROOT)): skipping(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "pytest.skip('x')",
        "pytestmark = pytest.mark.skipif(True, reason='x')",
        "a = pytest.importorskip('a')",
        "from pytest import skip as leave",
        "self.skipTest('x')",
        "@pytest.mark.xfail\ndef f(): ...",
    ],
)
def test_every_way_to_skip_is_seen(line: str) -> None:
    assert skipping(f"import pytest\n{line}\n")


def run(folder: Path, tests: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(f"import pytest\nfrom tests import needs\n{tests}")
    command = [sys.executable, "-m", "pytest", "-p", "tests.needs", "-p", "no:cacheprovider", *options, "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


LACKING = "def lacking(): needs.slurm.missing()\n"


def test_a_run_lists_needs_and_remedies(tmp_path: Path) -> None:
    needed = "".join(f"def test_{number}(): lacking()\n" for number in "ab") + "def test_c(): needs.mount.missing()\n"
    done = run(tmp_path, LACKING + needed + "def test_d(): pass\n", "-p", "xdist", "-n", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "2 tests need Slurm: apt-get install slurmctld slurmd slurm-client" in lines
    assert f"1 test needs to mount a file system: {needs.mount.remedy}" in lines


def test_a_skip_without_a_remedy_fails_the_run(tmp_path: Path) -> None:
    skip = "pytest." + "skip('no time')"
    done = run(tmp_path, f"def test_a(): {skip}\ndef test_b(): pass\n")
    assert done.returncode == 1
    assert "error: 1 test skipped without a remedy (no time): use tests/needs.py" in done.stdout.splitlines()


def test_nvcc_is_the_package_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two machines compile the kernels with two compilers."""
    for folder in ("bin", "site/nvidia/cu13/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(needs.sysconfig, "get_path", lambda _: str(tmp_path / "site"))
    assert needs.find_nvcc() == str(tmp_path / "site/nvidia/cu13/bin/nvcc")
    monkeypatch.setattr(needs.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    assert needs.find_nvcc() == str(tmp_path / "bin/nvcc")
