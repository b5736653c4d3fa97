"""Recipes of conversation sets: a YAML file with the parts of a mixture, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from steel_megatron.config import from_dict, load_yaml
from steel_megatron.config.checks import at_least, one_of
from steel_megatron.data.building.language import Language
from steel_megatron.errors import ConfigError

Answers = Literal["letter", "explained", "both"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is made of one published set."""

    inputs: list[str] = field(default_factory=list)
    """Files, folders or patterns, optionally as FORM=PATTERN, where the command names none."""
    language: Language | None = None
    """Keep only conversations of this language; None keeps all."""
    questions: Answers | None = None
    """The rows are multiple-choice questions, answered by the letter, by the explanation and the letter (chain of
    thought), or both ways, a conversation each; None for rows that are conversations or pairs."""
    fill: dict[str, str] = field(default_factory=dict)
    """What stands for ``{{NAME}}`` in the texts, by name."""
    copies: int = 1
    """How often each conversation is there."""

    def __post_init__(self) -> None:
        if self.language is not None:
            one_of(get_args(Language), self, "language")
        if self.questions is not None:
            one_of(get_args(Answers), self, "questions")
        at_least(1, self, "copies")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe file says."""

    parts: dict[str, Part]
    """The parts by name, in the order in which they are read."""
    shares: dict[Language, float] = field(default_factory=dict)
    """Share of each language in the result; what is too much of one is left out by a random choice. Empty: all."""
    seed: int = 0
    """Of that choice."""


def load_recipe(path: str | Path, sources: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        sources: ``PART=PATTERN``, in place of the ``inputs`` of a part; several of one part add up.

    Raises:
        ConfigError: the file cannot be read, something in it is unknown or out of range, a part has no inputs, or a
            source is of no part.
    """
    try:
        read = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict) or not isinstance(read.get("parts"), dict) or not read["parts"]:
        raise ConfigError(f"{path} holds no recipe: a mapping with parts, each by its name, was expected")
    given = _by_part(sources, list(read["parts"]))
    parts = {}
    for name, values in read["parts"].items():
        if not isinstance(values, dict | None):
            raise ConfigError(f"{path}, part {name}: {values!r} is not {{SETTING: VALUE, ...}}")
        own: dict[str, Any] = {**(values or {}), **({"inputs": given[name]} if name in given else {})}
        try:
            parts[name] = from_dict(Part, own, f"{path}, part {name}")
        except ConfigError as error:
            raise ConfigError(str(error) if str(path) in str(error) else f"{path}, part {name}: {error}") from None
    if missing := [name for name, part in parts.items() if not part.inputs]:
        raise ConfigError(
            f"{path}: no inputs are given for {', '.join(missing)}; name them: --sources {missing[0]}=PATTERN"
        )
    recipe: Recipe = from_dict(Recipe, {**read, "parts": parts}, str(path))
    if recipe.shares and (abs(sum(recipe.shares.values()) - 1) > 1e-6 or min(recipe.shares.values()) < 0):
        raise ConfigError(f"{path}: shares is {recipe.shares}; they must be at least 0, and 1 together")
    return recipe


def _by_part(sources: Sequence[str], parts: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for source in sources:
        name, equals, pattern = source.partition("=")
        if not equals or not pattern or name not in parts:
            raise ConfigError(f"source {source!r} is not PART=PATTERN; the parts are {', '.join(parts)}")
        found.setdefault(name, []).append(pattern)
    return found
