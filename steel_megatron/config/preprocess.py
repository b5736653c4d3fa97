"""A preprocessing job: documents to indexed corpora."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import get_args

from steel_megatron.config.checks import at_least, one_of
from steel_megatron.config.data import BadRowPolicy, TokenizerEngine, TokenizerKind
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """A preprocessing job."""

    inputs: list[str]
    """Files, folders or patterns, each alone or as SOURCE=PATTERN, such as skypile=data/sky/*.jsonl.zst."""
    output_prefix: str
    """Where the corpus goes; files are named PREFIX_KEY_document.bin and so on."""
    tokenizer_path: str
    """The tokenizer's folder or file."""
    tokenizer_kind: TokenizerKind = "huggingface"
    """What it is."""
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    """Which values of a JSON row are documents; one corpus for each."""
    workers: int = 1
    """Threads or processes, whichever is faster; the output is the same for any number."""
    append_eod: bool = True
    """Whether each document ends with the end-of-document token."""
    valid_fraction: float = 0.0
    """Share of documents, chosen by their hash, that goes into a validation corpus."""
    seed: int = 0
    """Enters the choice of the validation documents."""
    shard_size: int | None = None
    """Tokens after which a new corpus is begun; one corpus if not given."""
    on_bad_row: BadRowPolicy = "stop"
    """Whether a broken row stops the work or is skipped, counted and listed."""
    engine: TokenizerEngine = "auto"
    """What encodes; auto takes gigatoken where it is installed and gives the same ids."""
    overwrite: bool = False
    """Whether to replace an earlier corpus of that name, or begin an interrupted one anew."""
    report: str | None = None
    """File for the counts, as JSON."""
    eod_token: str | None = None
    """The token that ends a document; the tokenizer's own if not given."""

    def __post_init__(self) -> None:
        one_of(get_args(TokenizerKind), self, "tokenizer_kind")
        one_of(get_args(BadRowPolicy), self, "on_bad_row")
        one_of(get_args(TokenizerEngine), self, "engine")
        at_least(1, self, "workers", "shard_size")
        if not 0 <= self.valid_fraction < 1:
            raise ConfigError(f"PreprocessConfig.valid_fraction is {self.valid_fraction}; it must be in [0, 1)")
        if not self.json_keys or len(set(self.json_keys)) < len(self.json_keys):
            raise ConfigError(
                f"PreprocessConfig.json_keys is {self.json_keys}; it needs at least 1 key, and none twice"
            )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(
                f"PreprocessConfig.seed is a number of {self.seed.bit_length()} bits; it must be one of 64, from -2^63 "
                "to 2^63 - 1"
            )
        if os.path.basename(self.output_prefix) in ("", ".", ".."):
            raise ConfigError(
                f"PreprocessConfig.output_prefix is {self.output_prefix!r}; it must end in a name, such as data/corpus"
            )
