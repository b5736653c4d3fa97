"""Which tokens each process holds."""

from __future__ import annotations

import pytest
import torch

from steel_megatron.config import ModelConfig, ParallelConfig, RunConfig
from steel_megatron.errors import ConfigError
from steel_megatron.parallel.sequence import SequenceSplit


def test_context_parallelism_gives_each_process_an_early_and_a_late_piece() -> None:
    assert SequenceSplit(16, context_size=2).ranges == (((0, 4), (12, 16)), ((4, 8), (8, 12)))


def test_sequence_parallelism_cuts_what_a_process_holds() -> None:
    assert SequenceSplit(6, tensor_size=2).ranges == (((0, 3),), ((3, 6),))
    # Two tensor-parallel processes halve the two pieces of each context-parallel process; three cut through them.
    assert SequenceSplit(16, 2, 2).ranges == (((0, 4),), ((12, 16),), ((4, 8),), ((8, 12),))
    assert SequenceSplit(12, 2, 3).ranges[:3] == (((0, 2), (2, 2)), ((2, 3), (9, 10)), ((10, 12), (12, 12)))


@pytest.mark.parametrize("context_size", [1, 2, 3])
@pytest.mark.parametrize("tensor_size", [1, 2, 3])
def test_every_token_has_one_holder(context_size: int, tensor_size: int) -> None:
    split = SequenceSplit(36, context_size, tensor_size)
    positions = [split.positions(rank) for rank in range(split.ranks)]
    assert torch.cat(positions).sort().values.tolist() == list(range(36))
    for own in positions:
        assert len(own) == 36 // split.ranks and own.tolist() == sorted(own.tolist())


def test_the_degrees_of_a_layout() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2, expert_model_parallel_size=4
    )
    assert parallel.describe(8) == "TP2 SP PP1 CP2 EP4 DP2"
    assert parallel.data_parallel_size(8) == 2
    with pytest.raises(ConfigError, match=r"6 processes .* tensor x pipeline x context parallel = 2 x 1 x 2 = 4"):
        parallel.data_parallel_size(6)
    with pytest.raises(ConfigError, match=r"= 4 does not divide the data-parallel size 1 x context_parallel_size 2"):
        parallel.data_parallel_size(4)
    with pytest.raises(ConfigError, match="sequence_parallel is true, but tensor_model_parallel_size is 1"):
        ParallelConfig(sequence_parallel=True)


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({"sequence_length": 30}, {"context_parallel_size": 2}, r"30 is not divisible by 2 x context_.* = 4"),
        ({"sequence_length": 33}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "33 is not divisible"),
        (
            {"sequence_length": 36, "num_attention_heads": 3, "hidden_size": 96, "ffn_hidden_size": 96}
            | {"make_vocab_size_divisible_by": 96},
            {"tensor_model_parallel_size": 3, "sequence_parallel": True, "context_parallel_size": 2},
            None,
        ),
        (
            {"sequence_length": 64, "routing_mode": "merged", "block_length": 32},
            {"context_parallel_size": 2},
            None,
        ),
        ({"sequence_length": 64, "block_length": 32}, {"context_parallel_size": 2}, None),
        (
            {"ffn": "top_k_moe", "ffn_activation": "swiglu"},
            {"context_parallel_size": 2},
            None,
        ),
    ],
)
def test_sequences_must_fit_the_layout(model: dict, parallel: dict, message: str | None) -> None:
    def build() -> RunConfig:
        return RunConfig(
            model=ModelConfig(**{"routing_mode": "block_causal", **model}), parallel=ParallelConfig(**parallel)
        )

    if message is None:
        build()
        return
    with pytest.raises(ConfigError, match=message):
        build()
