"""Cleaning recipes: a YAML file with the operators in their order, checked before anything is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from steel_megatron.config import from_dict, load_yaml
from steel_megatron.data.cleaning.deduplication import ExactDeduplicator, SimhashDeduplicator
from steel_megatron.data.cleaning.filters import FILTERS, Alphanumeric, Filter, Perplexity, WordRepetition, WordsNum
from steel_megatron.data.cleaning.mappers import MAPPERS, Mapper
from steel_megatron.errors import ConfigError

Deduplicator = ExactDeduplicator | SimhashDeduplicator
Operator = Mapper | Filter | ExactDeduplicator | SimhashDeduplicator
DEDUPLICATORS: dict[str, type[Deduplicator]] = {kind.name: kind for kind in (ExactDeduplicator, SimhashDeduplicator)}
OPERATORS: dict[str, type[Operator]] = {**MAPPERS, **FILTERS, **DEDUPLICATORS}
"""Every operator by its name in a recipe."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe file says."""

    kind: Literal["text", "code"]
    """What the documents are; for readers of the recipe and the report."""
    operators: tuple[Operator, ...]
    """In the order they work in; deduplicators are the last."""
    sources: tuple[str, ...] = ()
    """Inputs, as for ``parse_inputs``."""
    output: str | None = None
    """Folder of the result."""
    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer, or a SentencePiece ``.model`` file, for operators that count tokens."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The operators' names; a second one of the same name has ``-2`` behind it."""
        labels: list[str] = []
        for operator in self.operators:
            earlier = sum(other.name == operator.name for other in self.operators[: len(labels)])
            labels.append(f"{operator.name}-{earlier + 1}" if earlier else operator.name)
        return tuple(labels)

    @property
    def perplexity(self) -> Perplexity | None:
        """The operator that needs a language model, unless it is left out."""
        found = [
            operator for operator in self.operators if isinstance(operator, Perplexity) and operator.model != "none"
        ]
        return found[0] if found else None

    def deduplicators(self) -> tuple[ExactDeduplicator | None, SimhashDeduplicator | None]:
        """The deduplicators of exact and near copies, as far as they are there."""
        exact = next((operator for operator in self.operators if isinstance(operator, ExactDeduplicator)), None)
        near = next((operator for operator in self.operators if isinstance(operator, SimhashDeduplicator)), None)
        return exact, near


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        overrides: values for ``sources``, ``output`` or ``tokenizer`` in place of the file's; None leaves the file's.

    Raises:
        ConfigError: the file cannot be read, or something in it is unknown or out of range; the message names the
            file, the operator and what would be right.
    """
    path = Path(path)
    try:
        read = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{path} holds no recipe: a mapping with the keys kind and operators was expected")
    known = {field.name for field in dataclasses.fields(Recipe)}
    given = [*read.items(), *overrides.items()]
    values = {key: value for key, value in given if value is not None or key not in known}  # a key without a value
    if "kind" not in values:
        raise ConfigError(f"{path}: kind is missing; it must be text or code")
    recipe: Recipe = from_dict(Recipe, {**values, "operators": ()}, str(path))
    recipe = dataclasses.replace(recipe, operators=_operators(values.get("operators"), path))
    _check_order(recipe, path)
    return recipe


def _operators(entries: object, path: Path) -> tuple[Operator, ...]:
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: operators must be a list of NAME or NAME: {{PARAMETER: VALUE}}, and not empty")
    built: list[Operator] = []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, str):
            entry = {entry: None}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(f"{path}, operator {number}: {entry!r} is not NAME or NAME: {{PARAMETER: VALUE}}")
        name, parameters = next(iter(entry.items()))
        if name not in OPERATORS:
            raise ConfigError(f"{path}, operator {number}: {name!r} is unknown; known are {', '.join(OPERATORS)}")
        if not isinstance(parameters, (dict, type(None))):
            raise ConfigError(f"{path}, operator {number}, {name}: {parameters!r} is not {{PARAMETER: VALUE, ...}}")
        try:
            built.append(from_dict(OPERATORS[name], parameters or {}, ""))
        except ConfigError as error:
            raise ConfigError(f"{path}, operator {number}, {name}: {error}") from None
    return tuple(built)


def _check_order(recipe: Recipe, path: Path) -> None:
    """What no operator can see by itself."""
    seen: list[str] = []
    for operator in recipe.operators:
        if seen and not isinstance(operator, (ExactDeduplicator, SimhashDeduplicator)):
            raise ConfigError(
                f"{path}: {operator.name} stands behind {seen[-1]}; deduplicators must be the last operators"
            )
        if isinstance(operator, (ExactDeduplicator, SimhashDeduplicator)):
            if operator.name in seen:
                raise ConfigError(f"{path}: {operator.name} is there twice; once is enough")
            if isinstance(operator, ExactDeduplicator) and seen:
                raise ConfigError(
                    f"{path}: {operator.name} stands behind {seen[-1]}; exact copies are found first, so put it before"
                )
            seen.append(operator.name)
    if sum(isinstance(operator, Perplexity) for operator in recipe.operators) > 1:
        raise ConfigError(f"{path}: {Perplexity.name} is there twice; once is enough")
    for operator in recipe.operators:
        by_token = (isinstance(operator, Alphanumeric) and operator.tokenization) or (
            isinstance(operator, (WordsNum, WordRepetition)) and operator.tokenization == "tokenizer"
        )
        if by_token and recipe.tokenizer is None:
            raise ConfigError(
                f"{path}: {operator.name} counts tokens; name a tokenizer (--tokenizer FOLDER, or tokenizer: in the "
                "recipe)"
            )
