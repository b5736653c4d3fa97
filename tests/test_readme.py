"""The README's commands are ones that the command line, the Makefile and the examples have."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from steel_megatron.cli import _parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INDENTED = [line.strip() for line in README.splitlines() if line.startswith("    ")]
PROGRAM = re.compile(r"steel-megatron |-m steel_megatron ")
COMMANDS = [line for line in INDENTED if PROGRAM.search(line)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5 and "make demo" in README and "make test" in README


@pytest.mark.parametrize("line", COMMANDS)
def test_options_are_known(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line[PROGRAM.search(line).end() :], comments=True)  # type: ignore[union-attr]
    name, options = _parse(words)
    assert name in (words[0], " ".join(words[:2])) and options


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|    )make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_are_named_are_there() -> None:
    named = re.findall(r"\b(?:examples|tools|docs|csrc|tests|benchmarks)/[\w./-]*", README)
    assert named
    for name in named:
        assert (ROOT / name.rstrip(".")).exists(), name


def test_the_corpus_is_what_the_readme_says() -> None:
    import json

    documents = [
        json.loads(line)
        for path in sorted((ROOT / "examples/quickstart/corpus").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(documents) >= 200
    assert {document["kind"] for document in documents} == {"fact", "explanation", "dialogue", "exam"}
    chinese = sum(document["lang"] == "zh" for document in documents)
    assert 0.75 < chinese / len(documents) < 0.85
    assert len({document["text"] for document in documents}) == len(documents)
