"""Where tokens come from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from steel_megatron.config.checks import at_least, typed
from steel_megatron.errors import ConfigError

TokenizerKind = Literal["huggingface", "sentencepiece"]
TokenizerEngine = Literal["auto", "gigatoken", "tokenizers"]
"""What encodes many texts: ``tokenizers`` stands for the tokenizer's own library, be it ``tokenizers`` or
``sentencepiece``; ``auto`` takes gigatoken where it is installed and gives the same ids."""
BadRowPolicy = Literal["stop", "skip"]
"""What becomes of a job at a row that cannot be read."""
MEGATRON_TOKENIZER_TYPES: dict[str, TokenizerKind] = {
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
}
"""What Megatron's --tokenizer-type calls them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    train: list[str] = field(default_factory=list)
    """Prefixes of indexed corpora (.bin and .idx) that a new run's ledger begins with, each read again and again. On
    the command line --data.train A B replaces the list and --data.train+ C adds to it."""
    ledger: str | None = None
    """The ledger of the run; if not given, ledger.json in its folder. See ``steel-megatron data --help``."""
    num_workers: int = 0
    """Processes that read ahead, for each training process; 0 reads when a step needs it. The samples are the same."""
    validation: list[str] | dict[str, list[str]] = field(default_factory=list)
    """Prefixes of indexed corpora to validate on, or such lists by name, each reported by itself; none for no
    validation. On the command line --data.validation.zh A sets one named list and keeps the others."""
    tokenizer_kind: TokenizerKind = "huggingface"
    """Which tokenizer made the corpora."""
    tokenizer_path: str | None = None
    """Its folder or file; copied into exported models."""
    reset_at_eod: bool = False
    """Keep the documents that share a sequence apart: attention and routing restart at each one, and the first token
    of a document is not predicted. Not with context or sequence parallelism."""

    def __post_init__(self) -> None:
        typed(self)
        at_least(0, self, "num_workers")
        if isinstance(self.validation, dict):
            for name, prefixes in self.validation.items():
                if not re.fullmatch(r"[\w.-]+", name):
                    raise ConfigError(
                        f"DataConfig.validation names a set {name!r}; use letters, digits, '.', '_' and '-', as it "
                        "becomes part of a metric's name"
                    )
                if not prefixes:
                    raise ConfigError(f"DataConfig.validation.{name} is empty; name a corpus, or leave the set out")

    @property
    def validation_sets(self) -> dict[str, list[str]]:
        """The corpora to validate on by name; the name is empty where they were given as one list."""
        if isinstance(self.validation, dict):
            return self.validation
        return {"": self.validation} if self.validation else {}
