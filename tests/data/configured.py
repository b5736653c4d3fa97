"""``preprocess`` and ``clean_corpus`` with paths of any kind and one or two settings of many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steel_megatron.config import CleanConfig, PreprocessConfig, TokenizerKind
from steel_megatron.data.cleaning import pipeline as cleaning
from steel_megatron.data.cleaning.pipeline import CleaningResult
from steel_megatron.data.preprocessing import pipeline as preprocessing
from steel_megatron.data.preprocessing.report import PreprocessReport
from steel_megatron.data.preprocessing.step import ChunkSizes


def preprocess(
    inputs: Sequence[str],
    output_prefix: str | Path,
    tokenizer_kind: TokenizerKind,
    tokenizer_path: str | Path,
    *,
    pace: ChunkSizes | None = None,
    **options: Any,
) -> PreprocessReport:
    """Run a job; ``options`` are further fields of its config."""
    config = PreprocessConfig(
        inputs=list(inputs),
        output_prefix=os.fspath(output_prefix),
        tokenizer_kind=tokenizer_kind,
        tokenizer_path=os.fspath(tokenizer_path),
        **_plain(options),
    )
    return preprocessing.preprocess(config, pace or ChunkSizes())


def clean_corpus(
    recipe: str | Path, sources: Sequence[str] = (), output: str | Path | None = None, **options: Any
) -> CleaningResult:
    """Run a job; ``options`` are further fields of its config."""
    where = None if output is None else os.fspath(output)
    config = CleanConfig(recipe=os.fspath(recipe), sources=list(sources), output=where, **_plain(options))
    return cleaning.clean_corpus(config)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
