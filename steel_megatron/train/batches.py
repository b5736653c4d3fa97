"""From indexed corpora to the micro batches of this process."""

from __future__ import annotations

import numpy as np
import torch

from steel_megatron.config import RunConfig
from steel_megatron.data.loader import (
    SampleStream,
    SequentialSamples,
    document_starts,
    end_of_document_id,
    micro_batches,
)
from steel_megatron.errors import ConfigError
from steel_megatron.parallel.topology import Topology
from steel_megatron.train.objective import Batch


class Batches:
    """Training and validation batches of one run.

    Args:
        run: the run's settings.
        topology: the process groups.

    Attributes:
        fingerprint: of everything that the order of training samples depends on.

    Raises:
        ConfigError: no training corpus is named, or the batch does not fit the launch.
        DataError: a corpus cannot be read.
    """

    def __init__(self, run: RunConfig, topology: Topology) -> None:
        if not run.data.train:
            raise ConfigError("data.train is empty; name at least one indexed corpus (a prefix made by preprocess)")
        run.num_micro_batches(topology.launch.world_size)  # checks the batch before anything is read
        self._run, self._topology = run, topology
        length, vocab_size = run.model.sequence_length, run.model.vocab_size
        self._eod_id = None
        self._stream = SampleStream(run.data.train, length, seed=run.training.seed, vocab_size=vocab_size)
        self._validation = None
        if run.data.validation:
            self._validation = SequentialSamples(run.data.validation, length, vocab_size=vocab_size)
        if run.data.reset_at_eod:
            validation = self._validation.corpora if self._validation else []
            self._eod_id = end_of_document_id([*self._stream.corpora, *validation])
        self.fingerprint = self._stream.fingerprint

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to validate on."""
        return self._validation is not None

    def training(self, consumed_samples: int) -> list[Batch]:
        """This process's micro batches of the step that begins after ``consumed_samples`` samples."""
        training = self._run.training
        arrays = micro_batches(
            self._stream,
            consumed_samples,
            training.global_batch_size,
            training.micro_batch_size,
            self._topology.data_parallel_rank,
            self._topology.data_parallel_size,
        )
        return [self._batch(array) for array in arrays]

    def validation(self) -> list[Batch]:
        """This process's micro batches of one validation; the same samples each time, under any layout.

        The last ones are filled up with samples that do not count, so that none is left out.
        """
        assert self._validation is not None
        training = self._run.training
        count = min(len(self._validation), training.eval_steps * training.global_batch_size)
        together = training.micro_batch_size * self._topology.data_parallel_size
        first = self._topology.data_parallel_rank * training.micro_batch_size
        batches = []
        for start in range(first, count + first, together):
            own = range(start, start + training.micro_batch_size)
            samples = [self._validation.sample(min(number, count - 1)) for number in own]
            counts = torch.tensor([[float(number < count)] for number in own])
            batches.append(self._batch(np.stack(samples), counts))
        return batches

    def _batch(self, samples: np.ndarray, counts: torch.Tensor | None = None) -> Batch:
        tokens = torch.from_numpy(samples.astype(np.int64, copy=False))
        mask = torch.ones(tokens.size(0), tokens.size(1) - 1)
        starts = None
        if self._eod_id is not None:
            starts = torch.from_numpy(document_starts(samples[:, :-1], self._eod_id))
            mask = (tokens[:, :-1] != self._eod_id).float()  # no document says how another one begins
        return Batch(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            loss_mask=mask if counts is None else mask * counts,
            segment_starts=starts,
        ).part(self._topology)
