"""Logits at chosen positions of texts, from the parts of a model that the processes of a launch hold together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from steel_megatron.config import ModelConfig
from steel_megatron.parallel.sequence import SequenceSplit
from steel_megatron.parallel.topology import Topology

Forward = Callable[[list[list[int]], list[tuple[int, int]]], torch.Tensor]
"""From B texts of token ids and N places (text, position) to the logits at these, float32 [N, V] on the CPU."""


def launched_forward(chunks: Sequence[Any], model: ModelConfig, topology: Topology) -> Forward:
    """The forward pass of a model that the processes of a launch hold together; those of one replica call it alike.

    Args:
        chunks: this process's parts of the model, in evaluation mode; wrapped, where they are in training.
        model: its settings.
        topology: the process groups.
    """
    # Imported here: in-loop evaluation may be configured where megatron-core is not prepared yet.
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    groups, parallel = topology.groups, topology.parallel
    shared = parallel.context_parallel_size > 1 or parallel.sequence_parallel

    @torch.no_grad()
    def forward(texts: list[list[int]], places: list[tuple[int, int]]) -> torch.Tensor:
        rows, positions = indices_of(places)
        # Where processes share sequences, any length but the training one may not be divisible.
        length = model.sequence_length if shared else max(map(len, texts))
        split = SequenceSplit(length, parallel.context_parallel_size)
        own = split.positions(topology.context_parallel_rank)
        tokens = padded(texts, length)[:, own].to(topology.device)
        index = torch.full((length,), -1)
        index[own] = torch.arange(len(own))

        def at_places(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            columns = index[positions]
            found = output[rows, columns.clamp(min=0)].float()
            found[columns < 0] = 0.0  # another context-parallel process has it
            found = gather_from_tensor_model_parallel_region(found, group=groups.tp)[:, : model.vocab_size]
            dist.all_reduce(found, group=groups.cp)
            return output.new_zeros(()), torch.ones((), dtype=torch.int32, device=output.device), found

        def step(_: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            return chunk(tokens, own.to(tokens.device).expand_as(tokens), None), at_places

        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(chunks) if parallel.interleaved else None,
            model=list(chunks),
            num_microbatches=1,
            forward_only=True,
            seq_length=length,
            micro_batch_size=len(texts),
        )
        found = reports[0] if reports else torch.empty(len(places), model.vocab_size, device=topology.device)
        found = found.contiguous()
        dist.broadcast(found, dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
        return found.cpu()

    return forward


def replicas(topology: Topology) -> tuple[int, int, Any]:
    """This process's number among those that compute different texts at the same time, their number and group."""
    parallel = topology.parallel
    if parallel.expert_model_parallel_size > 1 or parallel.fsdp:
        return 0, 1, None  # they need each other in every forward pass
    return topology.data_parallel_rank, topology.data_parallel_size, topology.groups.dp


def indices_of(places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and positions of places, int64 [N] each."""
    rows, positions = torch.tensor(places).T
    return rows, positions


def padded(texts: list[list[int]], length: int) -> torch.Tensor:
    """int64 [B, T]; zeros on the right, which tokens before them do not see in a causal model."""
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


def next_logits_of(forward: Forward) -> Callable[[torch.Tensor], torch.Tensor]:
    """From a text, int64 [1, T], to the logits of its next token, without a cache."""
    return partial(_next_logits, forward)


def _next_logits(forward: Forward, tokens: torch.Tensor) -> torch.Tensor:
    return forward(tokens.tolist(), [(0, tokens.size(1) - 1)])[0]
