"""Which settings a checkpoint may be read with: those under which its weights compute what they did."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from steel_megatron.config import ModelConfig
from steel_megatron.errors import CheckpointError
from steel_megatron.train import checkpoint_info
from tests.train.small_run import MODEL

INFO = checkpoint_info.CheckpointInfo(
    path=Path("step_00000004"),
    step=4,
    consumed_samples=32,
    model=MODEL,
    layout="TP1 PP1 EP1 DP1",
    world_size=1,
    has_optimizer=True,
    has_main_weights=False,
    data_fingerprint="",
)

NEVER, WHEN_BEGUN, ALWAYS = range(3)
# Another value of each setting, and when it may differ from the checkpoint's: never, where a new run begins with the
# weights of an old one (it may route tokens in another way), or always (given weights compute the same).
MAY_DIFFER: dict[str, tuple[Any, int]] = {
    "num_layers": (2, NEVER),
    "hidden_size": (64, NEVER),
    "num_attention_heads": (2, NEVER),
    "num_query_groups": (4, NEVER),
    "ffn": ("dense", NEVER),
    "ffn_activation": ("swiglu", NEVER),
    "ffn_hidden_size": (16, NEVER),
    "num_experts": (2, NEVER),
    "slots_per_expert": (1, NEVER),
    "routing_mode": ("merged", WHEN_BEGUN),
    "slot_input": ("normalized", WHEN_BEGUN),
    "block_length": (4, WHEN_BEGUN),
    "routing_scale_init": (2.0, ALWAYS),
    "moe_top_k": (1, WHEN_BEGUN),
    "moe_aux_loss_coeff": (0.5, ALWAYS),
    "moe_router_load_balancing_type": ("seq_aux_loss", ALWAYS),
    "shared_expert_intermediate_size": (8, NEVER),
    "vocab_size": (90, NEVER),
    "make_vocab_size_divisible_by": (64, NEVER),
    "sequence_length": (8, ALWAYS),
    "rotary_base": (10_000, NEVER),
    "norm_epsilon": (1e-5, NEVER),
    "init_method_std": (0.02, ALWAYS),
    "expert_init_method_std": (0.03, ALWAYS),
    "hidden_dropout": (0.1, ALWAYS),
    "attention_dropout": (0.1, ALWAYS),
    "identical_expert_init": (True, ALWAYS),
    "implementation": ("local", ALWAYS),
    "megatron": ({"softmax_scale": 0.1}, NEVER),
}


def test_it_is_decided_for_every_setting_of_a_model_whether_it_may_differ() -> None:
    """A setting that changes what is computed but no shape would go unnoticed otherwise."""
    assert [field.name for field in dataclasses.fields(ModelConfig)] == list(MAY_DIFFER)


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_another_model_is_refused_by_name(name: str) -> None:
    other, when = MAY_DIFFER[name]
    assert getattr(MODEL, name) != other
    model = dataclasses.replace(MODEL, **{name: other})
    for resumes, may in ((True, when == ALWAYS), (False, when != NEVER)):
        checkpoint_info.check_model(INFO, MODEL, resumes=resumes)
        if may:
            checkpoint_info.check_model(INFO, model, resumes=resumes)
        else:
            said = rf"was saved with model.{name} = .*, this run has {re.escape(str(other))}"
            with pytest.raises(CheckpointError, match=said):
                checkpoint_info.check_model(INFO, model, resumes=resumes)


def test_how_a_model_is_computed_may_differ() -> None:
    recomputing = dataclasses.replace(MODEL, megatron={"recompute_granularity": "full"})
    checkpoint_info.check_model(INFO, recomputing, resumes=True)


def test_query_groups_that_are_not_given_are_the_heads() -> None:
    said = dataclasses.replace(INFO, model=dataclasses.replace(MODEL, num_query_groups=4))
    checkpoint_info.check_model(said, dataclasses.replace(MODEL, num_query_groups=None), resumes=True)
