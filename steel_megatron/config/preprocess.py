"""A preprocessing job: documents to indexed corpora."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import get_args

from steel_megatron.config.checks import at_least, one_of
from steel_megatron.config.data import BadRowPolicy, TokenizerEngine, TokenizerKind
from steel_megatron.config.execution import ExecutionConfig
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(ExecutionConfig):
    """A preprocessing job."""

    inputs: list[str]
    """Files, folders, patterns, addresses (s3://...) or - (standard input), optionally as SOURCE=PATTERN."""
    output_prefix: str
    """Prefix of the output files: PREFIX_KEY_document.bin and so on."""
    tokenizer_path: str
    """Tokenizer folder or file."""
    tokenizer_kind: TokenizerKind = "huggingface"
    """Kind of the tokenizer."""
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    """JSON keys or paths (data.text, messages[].content) whose values are documents; one corpus per key."""
    workers: int = 1
    """Threads or processes that encode, whichever is faster; on Slurm and Ray, tasks that run at the same time."""
    tasks: int | None = None
    """Single-process tasks that the inputs are dealt to; default: one per unit of input on Slurm and Ray, else none."""
    append_eod: bool = True
    """End each document with the end-of-document token."""
    valid_fraction: float = 0.0
    """Fraction of documents, chosen by hash, for a validation corpus."""
    seed: int = 0
    """Seed of the validation split."""
    shard_size: int | None = None
    """Start a new corpus after this many tokens; default: one corpus."""
    on_bad_row: BadRowPolicy = "stop"
    """Stop at a broken row, or skip it: count and list it."""
    engine: TokenizerEngine = "auto"
    """Encoder; auto selects gigatoken if it is installed and gives the same ids."""
    overwrite: bool = False
    """Replace an existing corpus, or discard an interrupted job that had other settings."""
    report: str | None = None
    """File for the counts, as JSON."""
    eod_token: str | None = None
    """End-of-document token; default: the tokenizer's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(get_args(TokenizerKind), self, "tokenizer_kind")
        one_of(get_args(BadRowPolicy), self, "on_bad_row")
        one_of(get_args(TokenizerEngine), self, "engine")
        at_least(1, self, "shard_size")
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
