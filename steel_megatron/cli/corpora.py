"""The corpus commands: clean, preprocess, inspect, verify, merge."""

from __future__ import annotations

import sys
from typing import Literal

from steel_megatron.config import TokenizerKind


def clean(
    recipe: str,
    sources: list[str] = [],  # noqa: B006 (read by the parser, never changed)
    output: str | None = None,
    tokenizer: str | None = None,
    text_key: str = "text",
    on_bad_row: Literal["stop", "skip"] = "stop",
    executor: Literal["local", "slurm", "ray"] = "local",
    workers: int = 1,
    tasks: int | None = None,
    slurm_partition: str | None = None,
    slurm_time: str = "24:00:00",
    slurm_memory_gb: int = 4,
    slurm_qos: str | None = None,
    slurm_setup: str | None = None,
    overwrite: bool = False,
) -> None:
    """Clean corpora by a recipe: mappers, filters, duplicates; the same command goes on after a kill.

    Args:
        recipe: the recipe's YAML file, such as examples/steel_1b/clean_text.yaml.
        sources: files, folders or patterns, each alone or as SOURCE=PATTERN; the recipe's if not given.
        output: folder of the result; the recipe's if not given.
        tokenizer: folder of a Hugging Face tokenizer or a SentencePiece model, for operators that count tokens.
        text_key: which value of a row is the text, for inputs without a source's name.
        on_bad_row: whether a broken row stops the job, or is dropped, counted and quarantined.
        executor: where the tasks run.
        workers: tasks that run at the same time.
        tasks: tasks of a stage; one for each unit of input if not given.
        slurm_partition: partition of the Slurm jobs.
        slurm_time: time limit of a Slurm task.
        slurm_memory_gb: memory of a Slurm task.
        slurm_qos: quality of service of the Slurm jobs; the cluster's default if not given.
        slurm_setup: shell command that sets this environment up on a node.
        overwrite: whether to replace an earlier result, or begin anew an interrupted job of other settings.
    """
    from steel_megatron.data.cleaning.funnel import table
    from steel_megatron.data.cleaning.pipeline import clean_corpus

    result = clean_corpus(
        recipe,
        sources or None,
        output,
        tokenizer=tokenizer,
        text_key=text_key,
        on_bad_row=on_bad_row,
        executor=executor,
        workers=workers,
        tasks=tasks,
        slurm_partition=slurm_partition,
        slurm_time=slurm_time,
        slurm_memory_gb=slurm_memory_gb,
        slurm_qos=slurm_qos,
        slurm_setup=slurm_setup,
        overwrite=overwrite,
    )
    sys.stdout.write(table(result.report) + "\n")


def preprocess(
    inputs: list[str],
    output_prefix: str,
    tokenizer_path: str,
    tokenizer_kind: TokenizerKind = "huggingface",
    json_keys: list[str] = ["text"],  # noqa: B006 (read by the parser, never changed)
    workers: int = 1,
    append_eod: bool = True,
    valid_fraction: float = 0.0,
    seed: int = 0,
    shard_size: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    engine: Literal["auto", "gigatoken", "tokenizers"] = "auto",
    overwrite: bool = False,
    report: str | None = None,
    eod_token: str | None = None,
) -> None:
    """Tokenize documents into an indexed corpus (.bin, .idx, .json); the same command goes on after a kill.

    Args:
        inputs: files, folders or patterns, each alone or as SOURCE=PATTERN, such as skypile=data/sky/*.jsonl.zst.
        output_prefix: where the corpus goes; files are named PREFIX_KEY_document.bin and so on.
        tokenizer_path: the tokenizer's folder or file.
        tokenizer_kind: what it is.
        json_keys: which values of a JSON row are documents; one corpus for each.
        workers: threads or processes; the output is the same for any number.
        append_eod: whether each document ends with the end-of-document token.
        valid_fraction: share of documents, chosen by their hash, that goes into a validation corpus.
        seed: enters the choice of the validation documents.
        shard_size: tokens after which a new corpus is begun; one corpus if not given.
        on_bad_row: whether a broken row stops the work or is skipped, counted and listed.
        engine: what encodes; auto takes gigatoken where it is installed and gives the same ids.
        overwrite: whether to replace an earlier corpus of that name, or begin an interrupted one anew.
        report: file for the counts, as JSON.
        eod_token: the token that ends a document; the tokenizer's own if not given.
    """
    from steel_megatron.data.preprocessing.pipeline import preprocess as run

    result = run(
        inputs,
        output_prefix,
        tokenizer_kind,
        tokenizer_path,
        json_keys=tuple(json_keys),
        workers=workers,
        append_eod=append_eod,
        valid_fraction=valid_fraction,
        seed=seed,
        shard_size=shard_size,
        on_bad_row=on_bad_row,
        engine=engine,
        overwrite=overwrite,
        eod_token=eod_token,
        report=report,
    )
    sys.stdout.write(result.summary() + "\n")


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
