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
    """YAML file of the recipe, such as examples/steel_1b/clean_text.yaml."""
    sources: list[str] = field(default_factory=list)
    """Files, folders or patterns, optionally as SOURCE=PATTERN; default: the recipe's."""
    output: str | None = None
    """Output folder; default: the recipe's."""
    tokenizer: str | None = None
    """Hugging Face tokenizer folder or SentencePiece model, for operators that count tokens; default: the recipe's."""
    text_key: str = "text"
    """JSON key of the text, for inputs without a source name."""
    on_bad_row: BadRowPolicy = "stop"
    """Stop at a broken row, or skip it: count and quarantine it."""
    overwrite: bool = False
    """Replace an earlier result, or restart an interrupted job that had other settings; nothing else is replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(get_args(BadRowPolicy), self, "on_bad_row")
