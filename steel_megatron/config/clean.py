"""A cleaning job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from steel_megatron.config.checks import one_of
from steel_megatron.config.data import BadRowPolicy
from steel_megatron.config.execution import ExecutionConfig


@dataclass(frozen=True, kw_only=True)
class CleanConfig(ExecutionConfig):
    """A cleaning job."""

    recipe: str
    """The recipe's YAML file, such as examples/steel_1b/clean_text.yaml."""
    sources: list[str] = field(default_factory=list)
    """Files, folders or patterns, each alone or as SOURCE=PATTERN; the recipe's if not given."""
    output: str | None = None
    """Folder of the result; the recipe's if not given."""
    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer or a SentencePiece model, for operators that count tokens; the recipe's if not
    given."""
    text_key: str = "text"
    """Which value of a row is the text, for inputs without a source's name."""
    on_bad_row: BadRowPolicy = "stop"
    """Whether a broken row stops the job, or is dropped, counted and quarantined."""
    overwrite: bool = False
    """Whether to replace an earlier result, or begin anew an interrupted job of other settings; nothing else is ever
    replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(get_args(BadRowPolicy), self, "on_bad_row")
