"""What can be read, for people."""

from __future__ import annotations

import textwrap

from steel_megatron.data.reading.compression import COMPRESSIONS
from steel_megatron.data.reading.conversations import CHAT_FORMS
from steel_megatron.data.reading.forms import CODE_SUFFIXES, FORMS
from steel_megatron.data.reading.sources import SOURCES

_COLUMN = 18
_WIDTH = 80
_PLACES = (
    ("FOLDER/", "all files below it, links followed", "corpus/"),
    ("PATTERN", "* ? [...], and ** for any depth", "'corpus/**/part-*.jsonl'"),
    ("ADDRESS", "what a driver of fsspec opens (s3fs, gcsfs, ...)", "'s3://bucket/corpus/*.jsonl.zst'"),
    ("-", "standard input, or a pipe: JSON, compressed or not", "<(zcat a.jsonl.gz)"),
)


def listing() -> str:
    """The forms of files, the places they may lie in, and the sources by name, each with an example."""
    lines = [f"Forms, by the end of the name (most also with {', '.join(COMPRESSIONS)}):"]
    for form in FORMS:
        suffixes = [suffix for suffix in form.suffixes if suffix not in CODE_SUFFIXES]
        suffixes += ["source code"] if len(suffixes) < len(form.suffixes) else []
        lines += _entry(" ".join(suffixes), form.rows, form.example)
    lines += ["", "Inputs:"]
    for name, what, example in _PLACES:
        lines += _entry(name, what, example)
    lines += ["", "Sources, which say what the rows are (text, if none is named):"]
    for name, kind in SOURCES.items():
        about = CHAT_FORMS[name].about if name in CHAT_FORMS else kind.__doc__ or ""
        what = " ".join(about.partition("\n\n")[0].replace("``", "").split())
        lines += _entry(name, what, "corpus.jsonl" if name == "text" else f"{name}=raw/{name}/")
    lines += _entry("module:Class", "A class of your own, see docs/sources.md.", "my_sources:Poems=raw/poems/")
    return "\n".join(lines)


def _entry(name: str, what: str, example: str) -> list[str]:
    room = _WIDTH - _COLUMN - 2
    names, texts = textwrap.wrap(name, _COLUMN - 1), [*textwrap.wrap(what, room), f"--inputs {example}"]
    count = max(len(names), len(texts))
    names, texts = names + [""] * (count - len(names)), texts + [""] * (count - len(texts))
    return [f"  {left:{_COLUMN}}{right}".rstrip() for left, right in zip(names, texts, strict=True)]
