"""Packed documents (data.reset_at_eod): each is computed as if it were alone, under every layout that allows it."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from steel_megatron.config import DataConfig, ParallelConfig, RunConfig
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, PROCESSES, SHARED_LAYOUTS, compare, small_run, train

VARIANTS: dict[str, dict[str, Any]] = {
    "block_causal": {"block_length": 4},
    "sequence": {"routing_mode": "sequence"},
    "token": {"routing_mode": "token"},
    "merged": {"routing_mode": "merged", "block_length": 4},
    "dense": {"ffn": "dense", "routing_mode": None},
    # Blocks and segments of 4 may end with chunks of 6 or 12 tokens; those of 5 do not, nor do documents.
    "block_causal, blocks of 5": {"block_length": 5},
    "merged, segments of 5": {"routing_mode": "merged", "block_length": 5},
}


def packed_run(parallel: ParallelConfig, variant: str, steps: int = 3, **model: Any) -> RunConfig:
    run = small_run(parallel, steps=steps, **VARIANTS[variant], **model)
    return dataclasses.replace(run, data=DataConfig(reset_at_eod=True))


def together_and_alone(variant: str, lengths: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of documents packed into one sequence, and of each in a sequence of its own."""
    from steel_megatron.parallel.topology import initialize

    run = packed_run(ParallelConfig(), variant)
    topology = initialize(run.parallel)
    from steel_megatron.model.spec import build_model

    stage = build_model(run.model, topology, seed=1)

    def logits(tokens: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        stage.documents.set(starts)
        positions = torch.arange(tokens.size(1)).unsqueeze(0)
        with torch.no_grad():
            return stage(tokens, positions, None)[0]

    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 90, (1, length), generator=generator) for length in lengths]
    firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    starts = firsts.repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    # A micro batch of other documents comes first: nothing that was made for it is used again.
    logits(torch.cat(documents, dim=1), (torch.arange(sum(lengths)) // 5 * 5).unsqueeze(0))
    packed = logits(torch.cat(documents, dim=1), starts).split(lengths)
    return [(ours, logits(document, None)) for ours, document in zip(packed, documents, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_document_is_computed_as_if_alone(variant: str) -> None:
    for ours, alone in run_distributed(together_and_alone, 1, variant, [7, 1, 11, 5])[0]:
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


@cache
def alone(variant: str) -> list[Any]:
    return run_distributed(train, 1, packed_run(ParallelConfig(), variant))[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2", "tp2 ep2"])
@pytest.mark.parametrize("variant", ["block_causal", "sequence", "merged"])
def test_layouts_equal_one_process(layout: str, variant: str) -> None:
    compare(run_distributed(train, PROCESSES[layout], packed_run(LAYOUTS[layout], variant)), alone(variant))


def train_all(runs: list[RunConfig]) -> list[list[Any]]:
    return [train(run) for run in runs]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", SHARED_LAYOUTS)
def test_documents_on_several_processes_equal_one_process(layout: str) -> None:
    """Every fifty tokens or so a document ends: most lie on several processes of these layouts."""
    variants = ["block_causal", "merged"]
    if layout in ("cp2", "cp4", "cp2 tp2 sp", "tp2 sp ep2"):
        # A dense layer has no experts to share.
        variants = [variant for variant in VARIANTS if variant != "dense" or "ep2" not in layout]
    runs = [packed_run(LAYOUTS[layout], variant) for variant in variants]
    by_rank = run_distributed(train_all, PROCESSES[layout], runs)
    for number, variant in enumerate(variants):
        compare([results[number] for results in by_rank], alone(variant))


@pytest.mark.slow
@pytest.mark.parametrize("dropped", ["hidden_dropout", "attention_dropout"])
def test_documents_on_several_processes_drop_the_same(dropped: str) -> None:
    one, shared = (
        packed_run(layout, "block_causal", **{dropped: 0.2}) for layout in (ParallelConfig(), LAYOUTS["cp2"])
    )
    compare(run_distributed(train, 2, shared), run_distributed(train, 1, one)[0])
