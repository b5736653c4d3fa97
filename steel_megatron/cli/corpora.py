"""The commands that make and look at corpora: clean, preprocess, inspect, verify, merge."""

from __future__ import annotations

import sys

from steel_megatron.config import CleanConfig, PreprocessConfig, TokenizerKind


def clean(config: CleanConfig) -> None:
    """Clean corpora by a recipe: mappers, filters, duplicates; the same command goes on after a kill."""
    from steel_megatron.data.cleaning.funnel import table
    from steel_megatron.data.cleaning.pipeline import clean_corpus

    sys.stdout.write(table(clean_corpus(config).report) + "\n")


def preprocess(config: PreprocessConfig) -> None:
    """Tokenize documents into an indexed corpus (.bin, .idx, .json); the same command goes on after a kill."""
    from steel_megatron.data.preprocessing.pipeline import preprocess as run

    sys.stdout.write(run(config).summary() + "\n")


def inspect_corpora(
    prefixes: list[str],
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    samples: int = 3,
    json_output: bool = False,
) -> None:
    """Show what indexed corpora hold: counts, lengths, bytes per token by source, samples.

    Args:
        prefixes: corpora without .bin or .idx, or patterns such as data/corpus_text_document_*.
        tokenizer_path: the tokenizer's folder or file; decodes the samples and checks that it is the corpus' own.
        tokenizer_kind: what it is.
        samples: documents to show, evenly spread.
        json_output: whether to write JSON.
    """
    from steel_megatron.data.indexed.inspection import inspect_corpus

    inspect_corpus(prefixes, tokenizer_path, tokenizer_kind, samples, json_output)


def verify_corpora(prefixes: list[str], vocab_size: int | None = None, workers: int | None = None) -> None:
    """Read indexed corpora in full and check their structure, ids and checksums.

    Args:
        prefixes: corpora without .bin or .idx, or patterns such as data/corpus_text_document_*.
        vocab_size: all ids must be below it; what the corpus' manifest says if not given.
        workers: threads that read; one per processor, up to 8, if not given.
    """
    from steel_megatron.data.indexed.inspection import verify_corpus

    verify_corpus(prefixes, vocab_size, workers)


def merge_corpora(prefixes: list[str], output: str, overwrite: bool = False) -> None:
    """Write indexed corpora as one, in the given order, without loading them.

    Args:
        prefixes: corpora without .bin or .idx, or patterns such as data/corpus_text_document_*.
        output: where the new corpus goes, without .bin or .idx.
        overwrite: whether to replace an earlier corpus of that name.
    """
    from steel_megatron.data.indexed.inspection import merge_corpora as run

    run(prefixes, output, overwrite)
