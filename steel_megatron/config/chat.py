"""Conversations and preference pairs to indexed corpora with labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from steel_megatron.config.checks import at_least, one_of
from steel_megatron.config.data import BadRowPolicy, TokenizerKind
from steel_megatron.config.execution import ExecutionConfig
from steel_megatron.config.preprocess import PreprocessConfig
from steel_megatron.errors import ConfigError

ChatKind = Literal["sft", "pairs"]
LabelledTokens = Literal["assistant", "all"]
Truncation = Literal["drop", "oldest_turns", "answer", "answer_with_end"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(ExecutionConfig):
    """Conversations, or pairs, to an indexed corpus with labels."""

    inputs: list[str]
    """Files, folders, patterns or addresses, optionally as FORM=PATTERN (messages, sharegpt, alpaca, preference, ...;
    see steel-megatron sources); without a name, the form is told by the columns."""
    output_prefix: str
    """Prefix of the output: PREFIX_messages_document and PREFIX_labels_document; train on the former."""
    tokenizer_path: str
    """Tokenizer folder or file; its chat template is used, or ChatML where it has none."""
    tokenizer_kind: TokenizerKind = "huggingface"
    """Kind of the tokenizer."""
    eod_token: str | None = None
    """End-of-document token; default: the tokenizer's own."""
    max_tokens: int
    """Tokens of the longest conversation, or of both conversations of a pair: the sequence length to train with."""
    truncation: Truncation = "drop"
    """A conversation that is too long: skip it, leave out its oldest turns, cut the answer, or cut it and keep its end
    mark. Pairs that are too long are skipped."""
    train_on: LabelledTokens = "assistant"
    """What is predicted: the assistant's words and end marks, or all tokens."""
    workers: int = 1
    """Processes that encode; on Slurm and Ray, tasks that run at the same time."""
    tasks: int | None = None
    """Single-process tasks that the inputs are dealt to; default: one per unit of input on Slurm and Ray, else none."""
    valid_fraction: float = 0.0
    """Fraction of conversations, chosen by hash, for a validation corpus."""
    seed: int = 0
    """Seed of the validation split."""
    on_bad_row: BadRowPolicy = "stop"
    """Stop at a row that is no conversation, or skip it: count and list it."""
    overwrite: bool = False
    """Replace an existing corpus, or discard an interrupted job that had other settings."""
    report: str | None = None
    """File for the counts, as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(get_args(Truncation), self, "truncation")
        one_of(get_args(LabelledTokens), self, "train_on")
        at_least(2, self, "max_tokens")
        if "-" in self.inputs:
            raise ConfigError("PrepareConfig.inputs is standard input; conversations are read from files")
        self.job(["messages"])

    def job(self, keys: list[str]) -> PreprocessConfig:
        """The preprocessing job that it is.

        Args:
            keys: of the corpora.
        """
        own = ("max_tokens", "truncation", "train_on")
        same = {name: value for name, value in vars(self).items() if name not in own}
        return PreprocessConfig(**same, json_keys=keys, append_eod=False)
