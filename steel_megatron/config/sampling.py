"""How tokens of a continuation are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: maximum number of new tokens; an end-of-document token ends the text earlier.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample only from the k likeliest tokens; 0 for all.
        top_p: sample only from the likeliest tokens that have this probability together; 1 for all.
        min_p: sample only from tokens with at least this share of the likeliest one's probability; 0 for all.
        repetition_penalty: divides positive logits of tokens that are in the text, and multiplies negative ones; 1 for
            none.
        stop: strings that end the text before them.
        seed: random seed for sampling.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.top_k < 0 or not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"max_new_tokens = {self.max_new_tokens} must be at least 1, top_k = {self.top_k} at least 0, and "
                f"seed = {self.seed} from 0 to 2**63 - 1"
            )
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(f"temperature = {self.temperature} must be 0, or from 0.001 to 1000")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must be above 0 and at most 1, min_p = {self.min_p} from 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty = {self.repetition_penalty} must be above 0; 1 is none")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(f"stop = {self.stop!r} must be a list of strings with at least one character each")

    @property
    def without_effect(self) -> list[str]:
        """Names of settings that change nothing, because decoding is greedy."""
        neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return [] if self.temperature else [name for name, value in neutral.items() if getattr(self, name) != value]
