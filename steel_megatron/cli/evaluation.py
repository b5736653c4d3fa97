"""The commands about what a model is worth: evaluate, contamination."""

from __future__ import annotations

import importlib.util
from typing import Literal

from steel_megatron.cli.early import check_report, check_tokenizer
from steel_megatron.config import TokenizerKind, import_routing_code
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.streams import say


def evaluate(
    model: str,
    tasks: list[str],
    data: str,
    num_fewshot: int | None = None,
    scoring: Literal["letter", "answer", "generate"] = "letter",
    chat: bool = False,
    limit: int | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    show: int = 0,
    json: str | None = None,
    cache: str | None = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    tokenizer_path: str | None = None,
    tokenizer_kind: TokenizerKind = "huggingface",
    routing_code: str | None = None,
) -> None:
    """Score a model on benchmarks in local folders, with lm-eval's tasks; alone, under torchrun or under srun.

    Args:
        model: checkpoint folder (step_...), run folder (its newest checkpoint), or Hugging Face folder.
        tasks: benchmarks (ceval, cmmlu, mmlu, gsm8k) or tasks of lm-eval.
        data: folder with the benchmarks as published, each in a folder of its name.
        num_fewshot: examples before each question; default: the task's own number.
        scoring: multiple choice by the likelihood of letters, by that of full answers, or by reading generated replies.
        chat: put each question as a turn of the user, in the model's chat template.
        limit: questions of each subject at most.
        max_new_tokens: tokens of a generated reply, where the task names no number.
        batch_size: texts that are computed together.
        show: print so many prompts of each subject as the model gets them.
        json: file for all scores.
        cache: file with the answers of earlier runs; default: in the user's cache folder.
        tensor_model_parallel_size: processes that share the matrices of a checkpoint's layers.
        pipeline_model_parallel_size: processes that share a checkpoint's layers.
        tokenizer_path: tokenizer folder or file; default: the model's own.
        tokenizer_kind: kind of the tokenizer.
        routing_code: module that registers the checkpoint's routing mode, if it is not one of the library's.
    """
    import os
    from pathlib import Path

    from steel_megatron.config import ParallelConfig
    from steel_megatron.evaluation.protocol import Protocol, check_request
    from steel_megatron.parallel.launch import read_launch
    from steel_megatron.train.model_path import find_model

    need_harness("evaluate")
    protocol = Protocol(
        tasks=tasks,
        data=Path(data),
        num_fewshot=num_fewshot,
        scoring=scoring,
        chat=chat,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    check_request(tasks, Path(data), num_fewshot, scoring)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
    )
    check_report(json)
    check_tokenizer(tokenizer_path)
    if routing_code:
        import_routing_code(routing_code)
    named = find_model(model).path
    from steel_megatron.platform import prepare

    prepare()  # before megatron-core is imported
    from steel_megatron.evaluation.run import evaluate as run
    from steel_megatron.evaluation.run import write_summary

    found = run(
        named,
        protocol,
        parallel,
        tokenizer=(tokenizer_kind, tokenizer_path) if tokenizer_path else None,
        cache=Path(cache) if cache else None,
        show=show,
    )
    if read_launch(os.environ).rank != 0:
        return
    if json:
        write_summary(found, Path(json))
    for task, prompts in found.prompts.items():
        for number, prompt in enumerate(prompts, start=1):
            say(f"--- {task}, prompt {number}\n{prompt}")
    say(found.to_text())


def contamination(
    tasks: list[str],
    data: str,
    corpora: list[str],
    tokenizer_path: str,
    tokenizer_kind: TokenizerKind = "huggingface",
    ngram: int = 13,
    json: str | None = None,
) -> int:
    """Look for benchmarks' questions and answers in indexed corpora.

    The exit code is 0 if no n-gram of theirs occurs in a corpus, 1 if one does.

    Args:
        tasks: benchmarks (ceval, cmmlu, mmlu, gsm8k) or tasks of lm-eval.
        data: folder with the benchmarks as published, each in a folder of its name.
        corpora: corpus paths without .bin or .idx, or patterns such as data/corpus_text_document_*.
        tokenizer_path: tokenizer of the corpora: its folder or file, or the folder of a run, checkpoint or exported
            model trained on them.
        tokenizer_kind: kind of the tokenizer.
        ngram: words, or Chinese characters, that must stand in the same order to count as an overlap.
        json: file for all items that were found, with their documents.
    """
    from json import dumps
    from pathlib import Path

    from steel_megatron.evaluation.contamination import find_overlaps, open_corpora
    from steel_megatron.evaluation.protocol import check_request
    from steel_megatron.files import write_atomically
    from steel_megatron.hf.texts import tokenizer_named

    need_harness("contamination")
    check_report(json)
    check_request(tasks, Path(data), 0, "answer")
    tokenizer = tokenizer_named(tokenizer_kind, tokenizer_path)
    open_corpora(corpora, tokenizer, ngram)  # found out before the harness is there
    from steel_megatron.evaluation.tasks import load_benchmarks

    benchmarks = load_benchmarks(tasks, Path(data), 0, "answer")
    items = [item for one in benchmarks for item in one.items()]
    found = find_overlaps(items, corpora, tokenizer, ngram)
    if json:
        text = dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(json, text.encode("utf-8", "surrogatepass"), DataError)
    say(found.to_text())
    return 1 if found.found else 0


def need_harness(what: str) -> None:
    """Raise a ConfigError where lm-eval is not installed, which ``what`` needs."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{what} needs lm-eval: pip install 'steel-megatron[eval]'")
