"""From samples to the micro batches of this process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch

from steel_megatron.config import RunConfig
from steel_megatron.data.indexed.labels import kind_of
from steel_megatron.data.ledger.loader import (
    LabelledSamples,
    LedgerSamples,
    SampleArrays,
    Samples,
    SequentialSamples,
    WholeSamples,
    micro_batches,
    read_samples,
    validation_samples,
)
from steel_megatron.data.ledger.session import LedgerSession
from steel_megatron.errors import ConfigError
from steel_megatron.log import get_logger
from steel_megatron.parallel.agreement import raise_if_any_rank_failed
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.objective.base import objective_of
from steel_megatron.train.reading import read_ahead

logger = get_logger(__name__)

_IN_WORDS = {"sft": "conversations", "pairs": "pairs"}
_WAY_OUT = {
    "sft": "it would learn the rejected answers too. Train on pairs with steel-megatron dpo",
    "pairs": "make pairs with steel-megatron dpo prepare",
}
VALIDATION, CORPORA = 1 << 20, 1 << 10
"""The number of the first corpus of the first validation set, and what follows for each further set."""


class Batches:
    """Training and validation batches of one run.

    Args:
        run: the run's settings.
        topology: the process groups.
        session: the run's ledger; it must have started before training batches are asked for.

    Attributes:
        validation_sets: the samples to validate on, by the name of the set.

    Raises:
        DataError: a validation corpus cannot be read.
    """

    def __init__(self, run: RunConfig, topology: Topology, session: LedgerSession) -> None:
        self._run, self._topology, self._session = run, topology, session
        self._objective = objective_of(run)
        self._stream: LedgerSamples | None = None
        self._ahead: Iterator[list[SampleArrays]] = iter(())
        self._next = -1
        length, vocab_size = run.model.sequence_length, run.model.vocab_size
        self.validation_sets = raise_if_any_rank_failed(
            lambda: {
                name: validation_samples(prefixes, length, vocab_size, first)
                for first, (name, prefixes) in zip(
                    itertools.count(VALIDATION, CORPORA), run.data.validation_sets.items(), strict=False
                )
            }
        )
        for name, samples in self.validation_sets.items():
            self._check_kind(samples, f"data.validation.{name}" if name else "data.validation")
        session.accept_if(lambda samples: self._check_kind(samples, str(run.ledger_path)))
        for name, samples in self.validation_sets.items() if topology.launch.rank == 0 else ():
            if len(samples) < (batch := run.training.global_batch_size):
                what = f"data.validation.{name}" if name else "data.validation"
                logger.warning(f"{what} has {len(samples)} samples, fewer than one batch of {batch}; its loss is noisy")

    def training(self, consumed_samples: int) -> list[Any]:
        """This process's micro batches of the step that begins after ``consumed_samples`` samples."""
        if self._session.samples is not self._stream or consumed_samples != self._next:
            self._stream = self._session.samples
            assert self._stream is not None, "the session has not started"
            self._ahead = read_ahead(self._stream, self._run, self._topology, consumed_samples, self._session.end)
        self._next = consumed_samples + self._run.training.global_batch_size
        read = zip(self._which_count(consumed_samples), next(self._ahead), strict=True)
        return [self._batch(arrays, counts) for counts, arrays in read]

    def _batch(self, arrays: SampleArrays, counts: torch.Tensor | None) -> Any:
        tokens, starts, *labels = arrays
        labels = labels if arrays.labels is not None else []
        return self._objective.batch(tokens, starts, counts, self._topology, *labels)

    def _check_kind(self, samples: Samples, where: str) -> None:
        """Raise a ConfigError unless the objective is one for corpora of this kind."""
        labelled = samples.labelled
        if labelled != getattr(self._objective, "labelled", False):
            has, needs = ("labels", "none") if labelled else ("no labels", "them")
            raise ConfigError(
                f"the corpora of {where} have {has}, but training.objective = {self._run.training.objective} takes "
                f"{needs}; steel-megatron sft prepare makes conversations with labels, and sft and dpo train on them"
            )
        if labelled and not self._run.data.reset_at_eod:
            raise ConfigError(
                f"training.objective = {self._run.training.objective} packs whole documents, which must not see each "
                "other, but data.reset_at_eod is false; set it to true"
            )
        wanted: str | None = getattr(self._objective, "kind", None)
        if not labelled or wanted is None:
            return
        for corpus in cast(LabelledSamples, samples).corpora:
            found = kind_of(corpus)
            if found is not None and found != wanted:
                raise ConfigError(
                    f"{corpus.prefix} holds {_IN_WORDS[found]}, but training.objective = "
                    f"{self._run.training.objective} takes {_IN_WORDS[wanted]}; {_WAY_OUT[wanted]}"
                )

    def _which_count(self, consumed_samples: int) -> list[torch.Tensor | None]:
        """For each micro batch, which samples the ledger does not skip: float32 [B, 1], or None for all."""
        assert self._session.ledger is not None
        history, training = self._session.ledger.history, self._run.training
        place = self._topology.data_parallel_rank, self._topology.data_parallel_size
        own = micro_batches(consumed_samples, training.global_batch_size, training.micro_batch_size, *place)
        return [
            torch.tensor([[float(not history.skips(number))] for number in numbers])
            if history.skipped_in(numbers.start, numbers.stop)
            else None
            for numbers in own
        ]

    def validation(self) -> Iterator[tuple[str, list[Any]]]:
        """This process's micro batches of one validation, by set; the same samples each time, under any layout."""
        for name, samples in self.validation_sets.items():
            yield name, self._validation_batches(samples)

    def _validation_batches(self, samples: SequentialSamples | WholeSamples) -> list[Any]:
        training = self._run.training
        return self._part(samples, 0, min(len(samples), training.eval_steps * training.global_batch_size))

    def all_of(self, samples: WholeSamples) -> Iterator[list[Any]]:
        """This process's micro batches of all samples, a global batch at a time."""
        size = self._run.training.global_batch_size
        for begin in range(0, len(samples), size):
            yield self._part(samples, begin, min(size, len(samples) - begin))

    def _part(self, samples: SequentialSamples | WholeSamples, begin: int, count: int) -> list[Any]:
        """This process's micro batches of ``count`` samples.

        The last ones are filled up with samples that do not count, so that none is left out.
        """
        training, parallel = self._run.training, self._run.parallel
        samples_per_pass = training.micro_batch_size * self._topology.data_parallel_size
        first = self._topology.data_parallel_rank * training.micro_batch_size
        # The interleaved schedule takes as many micro batches as there are stages, or a multiple.
        together = samples_per_pass * (parallel.pipeline_model_parallel_size if parallel.interleaved else 1)
        end = -(-count // together) * together
        batches = []
        for start in range(first, end + first, samples_per_pass):
            own = range(start, start + training.micro_batch_size)
            numbers = [begin + min(number, count - 1) for number in own]
            counts = torch.tensor([[float(number < count)] for number in own])
            batches.append(self._batch(read_samples(samples, numbers, self._run.data.reset_at_eod), counts))
        return batches
