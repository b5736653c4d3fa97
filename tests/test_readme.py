"""Commands, options, files and links in the README and in docs/ exist."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.cli import _parse
from steel_megatron.config import RunConfig, from_dict

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = README
PROGRAM = re.compile(r"^(?:\$ )?(?:\w+=\S+ )?(?:(?:torchrun .*|python )-m steel_megatron|steel-megatron) ")
TOOL = re.compile(r"^python (tools/\w+\.py) ")


def _commands() -> list[tuple[str, str]]:
    """Each line of an indented or fenced block that starts a command, joined with the lines it continues on."""
    found = []
    for page, text in sorted(PAGES.items()):
        fenced = False
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("```"):
                fenced = not fenced
            elif (fenced or line.startswith("    ")) and (PROGRAM.match(line.strip()) or TOOL.match(line.strip())):
                found.append((page, line.strip()))
    return found


COMMANDS = _commands()


def test_there_are_commands() -> None:
    assert len([page for page, _ in COMMANDS if page == "docs/commands.md"]) >= 11
    assert len({page for page, _ in COMMANDS}) >= 8
    assert "make demo" in README and "make test" in README


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_options_are_known(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if tool := TOOL.match(line):
        monkeypatch.setattr(sys, "argv", [tool[1], *shlex.split(line[tool.end() :], comments=True)])
        assert runpy.run_path(tool[1])["parse_arguments"]()
        return
    program = PROGRAM.match(line)
    assert program
    words = shlex.split(line[program.end() :].split(" | ")[0], comments=True)
    for place in [place for place, word in enumerate(words) if word == "--config"]:
        if not words[place + 1].startswith("examples/"):  # the reader's own file
            words[place + 1] = "examples/quickstart/pretrain.yaml"
    name, options = _parse(words)
    assert name in (words[0], " ".join(words[:2])) and options
    if name == "pretrain":
        from_dict(RunConfig, options, page)


def test_the_layer_of_the_readme() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["y"].shape == (2, 1024, 512) and names["y"].isfinite().all() and names["y"].any()


def test_every_command_is_listed() -> None:
    from steel_megatron.cli import COMMANDS as known

    listed = re.findall(r"^\| `([a-z-]+)` \|", PAGES["docs/commands.md"], re.MULTILINE)
    assert sorted(listed) == sorted({name.split()[0] for name in known})


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|    )make ([a-z-]+)", "\n".join([*PAGES.values(), _read("CONTRIBUTING.md")])):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", [*sorted(PAGES), "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(page: str) -> None:
    text = _read(page)
    named = re.findall(r"(?<![\w./-])(?:examples|tools|docs|csrc|tests|benchmarks|steel_megatron)/[\w./-]*", text)
    for name in named:
        assert "my_" in name or (ROOT / name.rstrip(".")).exists(), name
    for link in re.findall(r"\]\(([^):#]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_the_corpus_is_what_the_readme_says() -> None:
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
