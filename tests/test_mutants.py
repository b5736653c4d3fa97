"""The lists of mutants fit the sources, and their runner tells what tests notice from what they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.mutants.run import ROOT, main, problem, read_mutants

LEAST = 60


def test_every_mutant_fits_the_sources() -> None:
    mutants = read_mutants(ROOT)
    assert len(mutants) >= LEAST
    assert len({mutant.name for mutant in mutants}) == len(mutants)
    assert not {mutant.name: why for mutant in mutants if (why := problem(mutant, ROOT))}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of two functions, of which the tests look at one; and a test that fails by itself."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # loading them would take most of the time
    (tmp_path / "tests" / "mutants").mkdir(parents=True)
    (tmp_path / "toy.py").write_text("def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n")
    tests = "def test_double():\n    assert double(3) == 6\n\n\ndef test_fails():\n    assert double is None\n"
    (tmp_path / "tests" / "test_toy.py").write_text(f"from toy import double\n\n\n{tests}")
    return tmp_path


def test_what_becomes_of_mutants(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits = {
        "tripled": ("2 * x", "3 * x", "test_double"),
        "not halved": ("x / 2", "x / 1", "test_double"),
        "renamed": ("def double", "def doubled", "test_double"),
        "undefined": ("2 * x", "two * x", "test_double"),
        "unfit": ("2 * x", "3 * x", "test_fails"),
        "nowhere": ("4 * x", "3 * x", "test_double"),
        "twice": ("return", "yield", "test_double"),
        "the same": ("2 * x", "2 * x", "test_double"),
        "untested": ("2 * x", "3 * x", "test_doubles"),
        "no Python": ("2 * x", "2 *", "test_double"),
    }
    entries = [
        {"name": name, "file": "toy.py", "find": find, "replace": replace, "tests": [f"tests/test_toy.py::{test}"]}
        for name, (find, replace, test) in edits.items()
    ]
    (project / "tests" / "mutants" / "toy.yaml").write_text(yaml.safe_dump(entries))
    before = (project / "toy.py").read_bytes()
    assert main(["--root", str(project), "--jobs", "1"]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    results = dict(line.split(" s  toy: ")[1].split(": ", 1) for line in lines)
    assert results.pop("no Python").startswith("broken: toy.py does not compile with it: ")
    assert results == {
        "tripled": "caught",
        "not halved": "SURVIVED",
        "renamed": "broken: pytest ended with exit code 4",
        "undefined": "broken: NameError: name 'two' is not defined",
        "unfit": "broken: tests/test_toy.py::test_fails fails without it",
        "nowhere": "broken: its text is 0 times in toy.py",
        "twice": "broken: its text is 2 times in toy.py",
        "the same": "broken: it changes nothing",
        "untested": "broken: there is no test tests/test_toy.py::test_doubles",
    }
    assert summary == "10 mutants, 1 caught, 1 survived, 8 broken"
    assert (project / "toy.py").read_bytes() == before
    assert main(["--root", str(project), "--jobs", "1", "--only", "tripled"]) == 0
    assert main(["--root", str(project), "--only", "quadrupled"]) == 2
