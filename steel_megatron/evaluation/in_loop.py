"""Benchmarks while a run trains: the model under training, in its layout, behind the harness's interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steel_megatron.config import RunConfig
from steel_megatron.data.tokenizing.tokenizer import load_tokenizer
from steel_megatron.errors import ConfigError
from steel_megatron.evaluation.language_model import EvaluatedModel
from steel_megatron.evaluation.protocol import Protocol
from steel_megatron.evaluation.run import run_harness
from steel_megatron.evaluation.scores import BenchmarkScores, macro
from steel_megatron.evaluation.tasks import load_benchmarks
from steel_megatron.hf.texts import texts_of_tokenizer
from steel_megatron.log import get_logger
from steel_megatron.train.callbacks import RunView
from steel_megatron.train.callbacks.base import EvaluatesTasks
from steel_megatron.train.callbacks.metrics import TensorBoard
from steel_megatron.train.engine import StepResult

logger = get_logger(__name__)


class TaskScores(EvaluatesTasks):
    """Puts the questions of ``evaluation.tasks`` to the model every so many steps; rank 0 writes the scores.

    Nothing of the run changes by it: no random number is drawn, and weights are only read.

    Args:
        run: the run's settings.

    Raises:
        ConfigError: the settings name no tokenizer.
    """

    def __init__(self, run: RunConfig) -> None:
        settings, data = run.evaluation, run.data
        assert settings.tasks and settings.data is not None, "without tasks there is nothing to evaluate"
        if data.tokenizer_path is None:
            raise ConfigError("evaluation.tasks needs the corpora's tokenizer; name it with data.tokenizer_path")
        self._every = settings.every
        self._protocol = Protocol(
            tasks=settings.tasks,
            data=Path(settings.data),
            num_fewshot=settings.num_fewshot,
            chat=settings.chat,
            limit=settings.limit,
            batch_size=settings.batch_size,
        )
        self._tokenizer = (data.tokenizer_kind, data.tokenizer_path)
        self._tensorboard = TensorBoard(first=False)

    def start(self, run: RunView) -> None:
        """Read the questions.

        Raises:
            ConfigError: there is no such task.
            DataError: data are missing or wrong.
        """
        finetunes = getattr(run.engine.objective, "labelled", False)
        self._texts = texts_of_tokenizer(load_tokenizer(*self._tokenizer), self._protocol.chat, finetunes)
        protocol = self._protocol
        # Read once: an error in them comes before the first step, not after a thousand.
        load_benchmarks(protocol.tasks, protocol.data, protocol.num_fewshot)
        self._tensorboard.start(run)

    def after_step(self, run: RunView, result: StepResult) -> None:
        """Evaluate, if it is time."""
        if result.step % self._every and result.step != run.config.training.last_step:
            return
        scores = self.evaluate(run)
        if run.is_rank0:
            self._report(scores, result.step)

    def evaluate(self, run: RunView) -> list[BenchmarkScores]:
        """The scores of the model as it is, the same on every process."""
        for chunk in run.chunks:  # waits for the weights of the step
            chunk.documents.set(None)
        for one in run.engine.models:
            one.eval()
        protocol = self._protocol
        asked = EvaluatedModel.launched(
            run.engine.models,
            run.config.model,
            run.topology,
            self._texts,
            batch_size=protocol.batch_size,
            fingerprint="",
        )
        # Tasks keep the answers to their requests, so each evaluation has tasks of its own.
        benchmarks = load_benchmarks(protocol.tasks, protocol.data, protocol.num_fewshot)
        scores, _ = run_harness(asked, benchmarks, protocol)
        return scores

    def stop(self, run: RunView) -> None:
        """Close the log."""
        self._tensorboard.stop(run)

    def _report(self, scores: Sequence[BenchmarkScores], step: int) -> None:
        for one in scores:
            for metric in one.metrics:
                mean = macro(one.over(one.subjects, metric))
                self._tensorboard.write({f"evaluation/{one.name}/{metric}": mean.value}, step)
            mean = macro(one.over(one.subjects))
            error = f" ± {mean.stderr:.4f}" if mean.stderr is not None else ""
            logger.info(f"step {step:>6} evaluation {one.name} {one.metric} {mean.value:.4f}{error}")
