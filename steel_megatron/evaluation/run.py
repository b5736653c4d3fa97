"""An evaluation from a model's folder to scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash

from steel_megatron.config import ParallelConfig, TokenizerKind
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.errors import ConfigError, DataError
from steel_megatron.evaluation.answers import Answers, default_path
from steel_megatron.evaluation.protocol import Protocol
from steel_megatron.evaluation.scores import BenchmarkScores, table
from steel_megatron.evaluation.tasks import Benchmark, load_benchmarks, quiet
from steel_megatron.files import write_atomically
from steel_megatron.generate import with_cache
from steel_megatron.hf.convert import read_config
from steel_megatron.hf.loading import load_model, load_parts
from steel_megatron.hf.mapping import config_from_hf
from steel_megatron.hf.texts import finetuned, texts_of_folder, texts_of_tokenizer, tokenizer_of_run
from steel_megatron.model.forward import Forward, indices_of, padded, replicas
from steel_megatron.parallel.agreement import raise_if_any_rank_failed
from steel_megatron.parallel.topology import Topology, initialize, read_launch, shutdown
from steel_megatron.train.checkpoint_info import CheckpointInfo
from steel_megatron.train.checkpoint_manifest import MANIFEST
from steel_megatron.train.model_path import ModelPath, find_model

if TYPE_CHECKING:
    from steel_megatron.evaluation.language_model import EvaluatedModel
    from steel_megatron.hf.modeling_steel import SteelForCausalLM


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        scores: by benchmark.
        prompts: the first prompts of each subject with what is expected, as they are put to the model.
        summary: everything as plain values.
    """

    scores: list[BenchmarkScores]
    prompts: dict[str, list[str]]
    summary: dict[str, Any]

    def to_text(self) -> str:
        """The scores as a table."""
        return table(self.scores)


def evaluate(
    path: Path,
    protocol: Protocol,
    parallel: ParallelConfig | None = None,
    *,
    tokenizer: tuple[TokenizerKind, str] | None = None,
    cache: Path | None = None,
    show: int = 0,
) -> Evaluation:
    """Evaluate a model on disk; every process of the launch calls it, and all get the same result.

    Args:
        path: exported folder, checkpoint (``step_...``), or a run's folder, whose newest checkpoint is taken.
        protocol: what is asked, and how.
        parallel: the layout of a checkpoint's model; None for a whole one on each process.
        tokenizer: kind and path; None for the model's own.
        cache: file with answers of earlier runs; None for the user's.
        show: prompts of each subject to return.

    Raises:
        CheckpointError: the folder is no model.
        ConfigError: a task is unknown, or a setting does not fit the model.
        DataError: data are not there or wrong.
    """
    parallel = parallel or ParallelConfig()
    found = find_model(path)
    benchmarks = load_benchmarks(
        protocol.tasks, protocol.data, protocol.num_fewshot, protocol.scoring, protocol.max_new_tokens
    )
    with ExitStack() as stack:
        model = stack.enter_context(_opened(found, protocol, parallel, tokenizer))
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            model.answers = Answers(cache or default_path())
            stack.callback(model.answers.close)
        scores, prompts = run_harness(model, benchmarks, protocol, show)
    return Evaluation(scores, prompts, _summary(found.path, protocol, model, scores))


def run_harness(
    model: EvaluatedModel, benchmarks: Sequence[Benchmark], protocol: Protocol, show: int = 0
) -> tuple[list[BenchmarkScores], dict[str, list[str]]]:
    """Put the questions of benchmarks to a model.

    Args:
        model: behind the harness's interface.
        benchmarks: with their data.
        protocol: how the questions are put.
        show: prompts of each subject to return.
    """
    from lm_eval.evaluator import evaluate as harness

    every = {name: task for one in benchmarks for name, task in one.subjects.items()}
    with quiet():
        found = harness(
            lm=model,
            task_dict={"tasks": every, "groups": {}, "group_map": {}},
            limit=protocol.limit,
            bootstrap_iters=100,
            log_samples=False,
            apply_chat_template=protocol.chat,
            fewshot_as_multiturn=protocol.chat,
        )
    scores = []
    for one in benchmarks:
        results = {name: found["results"][name] for name in one.subjects}
        questions = {name: found["n-samples"][name]["effective"] for name in one.subjects}
        scores.append(BenchmarkScores.of(one.name, results, questions, one.categories))
    shown = {name: _shown(task, show) for name, task in every.items()} if show else {}
    return scores, shown


def _shown(task: Any, count: int) -> list[str]:
    """The first prompts of a task; behind each the continuations whose likelihoods are compared."""
    prompts: dict[int, list[str]] = {}
    for instance in task.instances:
        context, more = instance.args[0], instance.args[1]
        entry = prompts.setdefault(instance.doc_id, [context])
        entry.append(repr(more) if isinstance(more, str) else f"generate: {json.dumps(more, ensure_ascii=False)}")
    return [f"{entry[0]}\n-> {', '.join(entry[1:])}" for entry in list(prompts.values())[:count]]


@contextmanager
def _opened(
    found: ModelPath, protocol: Protocol, parallel: ParallelConfig, tokenizer: tuple[TokenizerKind, str] | None
) -> Iterator[EvaluatedModel]:
    """A model on disk, ready to be asked."""
    if found.info is None and read_launch(os.environ).world_size == 1 and parallel == ParallelConfig():
        yield _exported(found.path, protocol, tokenizer)
        return
    there = dist.is_initialized()
    topology = initialize(parallel)
    try:
        if found.info is None:
            yield _exported(found.path, protocol, tokenizer, topology)
        else:
            yield _checkpoint(found.info, protocol, tokenizer, topology)
    finally:
        if not there:
            shutdown()


def _exported(
    path: Path, protocol: Protocol, tokenizer: tuple[TokenizerKind, str] | None, topology: Topology | None = None
) -> EvaluatedModel:
    from steel_megatron.evaluation.language_model import EvaluatedModel, Share

    if topology is not None and topology.data_parallel_size != topology.launch.world_size:
        raise ConfigError(
            f"{path} is an exported folder, which is evaluated whole on each process (data parallel); evaluate the "
            "checkpoint it was made from to cut the model"
        )
    settings = config_from_hf(read_config(path), str(path / "config.json"))
    texts = (
        texts_of_tokenizer(load_tokenizer(*tokenizer), protocol.chat)
        if tokenizer
        else texts_of_folder(path, protocol.chat)
    )
    module = load_model(path)
    return EvaluatedModel(
        _exported_forward(module),
        with_cache(module),
        texts,
        settings=settings,
        batch_size=protocol.batch_size,
        fingerprint=_fingerprint([*sorted(path.glob("*.safetensors")), path / "config.json"], texts.identity),
        share=Share(*replicas(topology)) if topology else None,
    )


def _checkpoint(
    info: CheckpointInfo, protocol: Protocol, tokenizer: tuple[TokenizerKind, str] | None, topology: Topology
) -> EvaluatedModel:
    from steel_megatron.evaluation.language_model import EvaluatedModel

    path = info.path
    own = raise_if_any_rank_failed(lambda: load_tokenizer(*tokenizer) if tokenizer else tokenizer_of_run(path))
    texts = raise_if_any_rank_failed(lambda: texts_of_tokenizer(own, protocol.chat, finetuned(path)))
    chunks, model = load_parts(info, topology)
    fingerprint = _fingerprint([path / MANIFEST], texts.identity)
    return EvaluatedModel.launched(
        chunks, model, topology, texts, batch_size=protocol.batch_size, fingerprint=fingerprint
    )


def _exported_forward(module: SteelForCausalLM) -> Forward:
    """The forward pass of an exported model in this process."""

    @torch.no_grad()
    def forward(texts: list[list[int]], places: list[tuple[int, int]]) -> torch.Tensor:
        rows, positions = indices_of(places)
        tokens = padded(texts, max(map(len, texts)))
        return module(input_ids=tokens, use_cache=False).logits[rows, positions].float()

    return forward


def _fingerprint(files: Sequence[Path], more: str) -> str:
    """Of the content of files."""
    digest = xxhash.xxh3_128(more.encode())
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _summary(
    path: Path, protocol: Protocol, model: EvaluatedModel, scores: Sequence[BenchmarkScores]
) -> dict[str, Any]:
    import lm_eval

    return {
        "model": str(path),
        "fingerprint": model.fingerprint,
        "harness": f"lm-eval {lm_eval.__version__}",
        "protocol": {
            "num_fewshot": protocol.num_fewshot,
            "scoring": protocol.scoring,
            "chat": protocol.chat,
            "limit": protocol.limit,
        },
        "requests": {"computed": model.counts.computed, "reused": model.counts.reused},
        "prompts_cut": len(model.counts.cut),
        "tasks": {one.name: one.to_dict() for one in scores},
    }


def write_summary(evaluation: Evaluation, output: Path) -> None:
    """Write everything that was found as JSON.

    Raises:
        DataError: the file cannot be written.
    """
    text = json.dumps(evaluation.summary, indent=1, ensure_ascii=False) + "\n"
    write_atomically(str(output), text.encode(), DataError)
