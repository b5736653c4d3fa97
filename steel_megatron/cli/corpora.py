"""The corpus commands: clean, preprocess, inspect, verify, merge."""

from __future__ import annotations

from steel_megatron.config import CleanConfig, ExecutionConfig, PreprocessConfig, TokenizerKind, job_doubts
from steel_megatron.log import get_logger
from steel_megatron.streams import say

logger = get_logger(__name__)


def clean(config: CleanConfig) -> None:
    """Clean corpora by a recipe: mappers, filters, deduplication. Repeat the command to resume after a kill."""
    from steel_megatron.data.cleaning.funnel import table
    from steel_megatron.data.cleaning.pipeline import clean_corpus

    _tell_doubts(config)
    say(table(clean_corpus(config).report))


def preprocess(config: PreprocessConfig) -> None:
    """Tokenize documents into an indexed corpus (.bin, .idx, .json). Repeat the command to resume after a kill."""
    from steel_megatron.data.preprocessing.pipeline import preprocess as run

    _tell_doubts(config)
    say(run(config).summary())


def _tell_doubts(config: ExecutionConfig) -> None:
    for doubt in job_doubts(config):
        logger.warning(doubt)


def inspect_corpora(
    prefixes: list[str],
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    samples: int = 3,
    json_output: bool = False,
) -> None:
    """Show counts, lengths, bytes per token by source, and samples of indexed corpora.

    Args:
        prefixes: corpus paths without .bin or .idx, or patterns such as data/corpus_text_document_*.
        tokenizer_path: tokenizer folder or file, to decode samples; must be the corpus' own.
        tokenizer_kind: kind of the tokenizer.
        samples: number of documents to show, evenly spaced.
        json_output: print JSON.
    """
    from steel_megatron.data.indexed.inspection import inspect_corpus

    inspect_corpus(prefixes, tokenizer_path, tokenizer_kind, samples, json_output)


def verify_corpora(prefixes: list[str], vocab_size: int | None = None, workers: int | None = None) -> None:
    """Read indexed corpora in full and check their structure, ids and checksums.

    Args:
        prefixes: corpus paths without .bin or .idx, or patterns such as data/corpus_text_document_*.
        vocab_size: upper bound of all ids; default: from the manifest.
        workers: reader threads; default: one per processor, up to 8.
    """
    from steel_megatron.data.indexed.inspection import verify_corpus

    verify_corpus(prefixes, vocab_size, workers)


def merge_corpora(prefixes: list[str], output: str, overwrite: bool = False) -> None:
    """Concatenate indexed corpora in the given order, without loading them.

    Args:
        prefixes: corpus paths without .bin or .idx, or patterns such as data/corpus_text_document_*.
        output: path of the new corpus, without .bin or .idx.
        overwrite: replace an existing corpus.
    """
    from steel_megatron.data.indexed.inspection import merge_corpora as run

    run(prefixes, output, overwrite)
