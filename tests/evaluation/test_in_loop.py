"""Benchmarks while a run trains: the scores of the saved checkpoint, under every layout; training is not changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import DataConfig, EvaluationConfig, ParallelConfig, RunConfig
from steel_megatron.errors import ConfigError
from steel_megatron.report import read_scalars
from tests.evaluation.benchmarks import write_benchmarks
from tests.fixtures.make_tokenizer import SPECIAL, VOCABULARY, make_tokenizer
from tests.layouts import sft_runs, test_dpo
from tests.layouts.pool import Pool
from tests.train.test_loop import make_run, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in_loop")
    write_benchmarks(folder / "data")
    make_tokenizer(folder / "tokenizer")
    write_corpus(folder / "train", 60, 5)
    return folder


def run_of(folder: Path, name: str, parallel: ParallelConfig, **evaluation: Any) -> RunConfig:
    data = DataConfig(train=[str(folder / "train")], tokenizer_path=str(folder / "tokenizer"))
    run = make_run(data, folder / name, parallel, train_steps=3)
    model = dataclasses.replace(run.model, vocab_size=VOCABULARY + len(SPECIAL), sequence_length=192)
    settings = {"tasks": ["cmmlu_arts", "mmlu_anatomy"], "data": str(folder / "data"), "every": 2, **evaluation}
    return dataclasses.replace(run, model=model, evaluation=EvaluationConfig(**settings))


def trained(run: RunConfig) -> list[float]:
    """The losses of a run, evaluated as the command does it."""
    from steel_megatron.evaluation.in_loop import TaskScores
    from steel_megatron.train.loop import pretrain

    return list(pretrain(run, [TaskScores(run)] if run.evaluation.tasks else []).losses)


def trained_and_rendered(run: RunConfig) -> tuple[list[float], list[str]]:
    """The losses, and the questions as the chat template has them."""
    from steel_megatron.evaluation.language_model import EvaluatedModel

    found: list[str] = []
    render = EvaluatedModel.apply_chat_template

    def noted(model: EvaluatedModel, *args: Any, **kwargs: Any) -> str:
        found.append(render(model, *args, **kwargs))
        return found[-1]

    EvaluatedModel.apply_chat_template = noted  # type: ignore[method-assign]
    try:
        return trained(run), found
    finally:
        EvaluatedModel.apply_chat_template = render  # type: ignore[method-assign]


def scored(path: Path, run: RunConfig, folder: Path) -> dict[str, float]:
    """The scores of a checkpoint."""
    from steel_megatron.evaluation.run import Protocol, evaluate
    from steel_megatron.evaluation.scores import macro

    found = evaluate(
        path,
        Protocol(tasks=run.evaluation.tasks, data=folder / "data", chat=run.evaluation.chat),
        cache=folder / "answers",
    )
    return {
        f"evaluation/{one.name}/{metric}": macro(one.over(one.subjects, metric)).value
        for one in found.scores
        for metric in one.metrics
    }


def test_scores_are_those_of_the_checkpoint(folder: Path) -> None:
    pool = Pool()
    alone = run_of(folder, "alone", ParallelConfig())
    (losses,) = pool.run(trained, 1, alone)
    (without,) = pool.run(trained, 1, run_of(folder, "without", ParallelConfig(), tasks=[]))
    assert losses == without
    (expected,) = pool.run(scored, 1, alone.checkpoints_dir / "step_00000003", alone, folder)
    scalars = {name: points for name, points in read_scalars(alone.tensorboard_dir).items() if "evaluation/" in name}
    assert {name: points[-1] for name, points in scalars.items()} == {
        name: (3, pytest.approx(value)) for name, value in expected.items()
    }
    assert all([step for step, _ in points] == [2, 3] for points in scalars.values())
    for name, layout in (
        ("tp2 sp", ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
        ("dp2", ParallelConfig()),
    ):
        run = run_of(folder, name.replace(" ", "_"), layout)
        pool.run(trained, 2, run)
        found = read_scalars(run.tensorboard_dir)
        assert {key: found[key][-1][1] for key in expected} == pytest.approx(expected), name
    pool.close()


def test_finetuning_is_evaluated_in_the_chat_template(folder: Path) -> None:
    """By sft and dpo: the scores of the saved checkpoint, and the losses of a run without evaluation."""
    pool = Pool()
    chats, pairs = sft_runs.prepared(folder), test_dpo.prepared(folder)
    origin = test_dpo.origin_of(folder, pool)
    finetune = sft_runs.run_of(chats, folder / "unused", ParallelConfig())
    prefer = test_dpo.run_on_pairs(pairs, folder / "unused", "", "sigmoid", origin)
    for name, base in (("sft", finetune), ("dpo", prefer)):
        settings = EvaluationConfig(tasks=["mmlu_anatomy"], data=str(folder / "data"), every=6, chat=True)
        data = dataclasses.replace(base.data, tokenizer_path=str(folder / "tokenizer"))
        model = dataclasses.replace(base.model, sequence_length=192)
        runs = [
            dataclasses.replace(
                base,
                data=data,
                model=model,
                evaluation=evaluation,
                checkpoint=dataclasses.replace(
                    base.checkpoint, directory=str(folder / f"{name}_{bool(evaluation.tasks)}")
                ),
            )
            for evaluation in (settings, EvaluationConfig())
        ]
        (with_scores, rendered), (without, none) = (pool.run(trained_and_rendered, 1, run)[0] for run in runs)
        assert with_scores == without and len(without) == 6
        assert {text.count("<|im_start|>user") for text in rendered} == {1} and none == []
        checkpoint = runs[0].checkpoints_dir / "step_00000006"
        (expected,) = pool.run(scored, 1, checkpoint, runs[0], folder)
        found = read_scalars(runs[0].tensorboard_dir)
        assert {key: found[key] for key in expected} == {
            key: [(6, pytest.approx(own))] for key, own in expected.items()
        }
        rate = "speed/labels_per_second" if name == "sft" else "speed/pairs_per_second"
        tokens, items = found["speed/tokens_per_second"], found[rate]
        assert all(own[1] < of[1] for own, of in zip(items, tokens, strict=True))
    pool.close()


def test_tasks_that_nobody_evaluates_are_refused(folder: Path) -> None:
    from steel_megatron.train.loop import pretrain

    with pytest.raises(ConfigError, match="none of the callbacks evaluates them"):
        pretrain(run_of(folder, "refused", ParallelConfig()))
    with pytest.raises(ConfigError, match="data is not given; name the folder"):
        EvaluationConfig(tasks=["ceval"])
