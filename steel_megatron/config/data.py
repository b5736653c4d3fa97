"""Where tokens come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from steel_megatron.config.checks import at_least

TokenizerKind = Literal["huggingface", "sentencepiece"]
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
    """Prefixes of indexed corpora (.bin and .idx) that a new run's ledger begins with, each read again and again."""
    ledger: str | None = None
    """The ledger of the run; if not given, ledger.json in its folder. See ``steel-megatron data --help``."""
    num_workers: int = 0
    """Processes that read ahead, for each training process; 0 reads when a step needs it. The samples are the same."""
    validation: list[str] = field(default_factory=list)
    """Prefixes of indexed corpora to validate on; none for no validation."""
    tokenizer_kind: TokenizerKind = "huggingface"
    """Which tokenizer made the corpora."""
    tokenizer_path: str | None = None
    """Its folder or file; copied into exported models."""
    reset_at_eod: bool = False
    """Keep the documents that share a sequence apart: attention and routing begin anew with each, and the first token
    of a document is not predicted. Not with context or sequence parallelism."""

    def __post_init__(self) -> None:
        at_least(0, self, "num_workers")
