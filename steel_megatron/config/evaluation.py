"""Benchmarks while a run trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from steel_megatron.config.checks import at_least, typed
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Benchmarks while a run trains."""

    tasks: list[str] = field(default_factory=list)
    """Benchmarks (ceval, cmmlu, mmlu, gsm8k) or tasks of lm-eval, as of steel-megatron evaluate; none for no
    evaluation."""
    data: str | None = None
    """Folder with the benchmarks as published, each in a folder of its name."""
    every: int = 1000
    """Steps between two evaluations; the last step is always evaluated."""
    num_fewshot: int | None = None
    """Examples before each question; none for the task's own number."""
    chat: bool = False
    """Put each question as a turn of the user, in the chat template."""
    limit: int | None = None
    """Questions of each subject at most; none for all."""
    batch_size: int = 16
    """Texts that are computed together."""

    def __post_init__(self) -> None:
        typed(self)
        at_least(1, self, "every", "limit", "batch_size")
        at_least(0, self, "num_fewshot")
        if self.tasks and self.data is None:
            raise ConfigError(
                f"EvaluationConfig.tasks is {self.tasks}, but data is not given; name the folder with the benchmarks"
            )
