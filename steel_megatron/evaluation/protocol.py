"""How questions are put and scored. Nothing here needs the harness, so that a wrong wish is told before it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from steel_megatron.errors import ConfigError, DataError

Scoring = Literal["letter", "answer", "generate"]
"""How a multiple choice is scored: the likelihood of the options' letters, that of the options' texts (in full and
per character), or the letter read from a generated reply."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How questions are put and scored.

    Attributes:
        tasks: benchmarks, or tasks of the harness.
        data: folder with their data.
        num_fewshot: examples before each question; None for the task's own number.
        scoring: how multiple choice is scored.
        chat: put each question as a turn of the user, in the model's chat template.
        limit: questions of each subject at most; None for all.
        max_new_tokens: of a generated reply, where the task names no number.
        batch_size: texts that are computed together.
    """

    tasks: Sequence[str]
    data: Path
    num_fewshot: int | None = None
    scoring: Scoring = "letter"
    chat: bool = False
    limit: int | None = None
    max_new_tokens: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1")


def check_request(names: Sequence[str], data: Path, num_fewshot: int | None, scoring: Scoring) -> None:
    """Refuse what no benchmark can be, before any is looked for.

    Args:
        names: of benchmarks or tasks.
        data: folder with their data.
        num_fewshot: examples before each question; None for the task's own number.
        scoring: how multiple choice is scored.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: there is no such folder.
    """
    if not data.is_dir():
        raise DataError(f"there is no folder {data}; --data names the folder with the benchmarks")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot = {num_fewshot} must be at least 0")
    if scoring not in get_args(Scoring):
        raise ConfigError(f"scoring is {scoring!r}; it must be one of {', '.join(get_args(Scoring))}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"tasks are {', '.join(names) or 'none'}; name each once")
