"""The table of what a run can be made of. A new layout option is one line here; the plan is made from it."""

from __future__ import annotations

import ast
import dataclasses
from contextlib import suppress
from functools import cache
from typing import Any

from steel_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from steel_megatron.errors import ConfigError
from tests.layouts.pairs import Row

MOST_PROCESSES = 8
BASE = RunConfig(
    model=ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=24,
        num_experts=4,
        slots_per_expert=2,
        routing_mode="block_causal",
        block_length=8,
        shared_expert_intermediate_size=16,
        vocab_size=100,  # of 128 rows: the last of four processes has little but padding
        sequence_length=24,
        init_method_std=0.1,  # large enough that experts and routing matter to the loss
    ),
    # Adam divides a gradient by its own size: the keys' biases, whose gradient is rounding alone, would move.
    optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2, epsilon=1e-4),
    training=TrainingConfig(train_steps=20, global_batch_size=8, micro_batch_size=4),
)
COPIES = "copies"
"""In place of a setting: how many times as many processes as the other settings need at least."""

Settings = dict[str, Any]
"""Values by ``section.field``."""

FEATURES: dict[str, dict[str, Settings]] = {
    "mode": {
        "block_causal": {},
        "sequence": {"model.routing_mode": "sequence"},
        "token": {"model.routing_mode": "token"},
        "merged": {"model.routing_mode": "merged"},
        "dense": {"model.ffn": "dense", "model.routing_mode": None},
        "none": {"model.ffn": "none", "model.routing_mode": None},
        # Its balancing loss is over the tokens that one process sees at a time.
        "top_k_moe": {
            "model.ffn": "top_k_moe",
            "model.routing_mode": None,
            "model.ffn_activation": "swiglu",
            "model.moe_aux_loss_coeff": 0.0,
        },
    },
    "tensor": {
        "": {},
        "TP2": {"parallel.tensor_model_parallel_size": 2},
        "TP4": {"parallel.tensor_model_parallel_size": 4},
    },
    "sequence": {"": {}, "SP": {"parallel.sequence_parallel": True}},
    "pipeline": {
        "": {},
        "PP2": {"parallel.pipeline_model_parallel_size": 2},
        "PP4": {"parallel.pipeline_model_parallel_size": 4, "parallel.pipeline_layers": [0, 1, 1, 0]},
        "VPP2": {
            "parallel.pipeline_model_parallel_size": 2,
            "parallel.virtual_pipeline_model_parallel_size": 2,
            "parallel.pipeline_layers": [0, 1, 1, 0],
        },
        "uneven": {"parallel.pipeline_model_parallel_size": 2, "parallel.pipeline_layers": [0, 2]},
    },
    "context": {"": {}, "CP2": {"parallel.context_parallel_size": 2}, "CP4": {"parallel.context_parallel_size": 4}},
    "expert": {
        "": {},
        "EP2": {"parallel.expert_model_parallel_size": 2},
        "EP4": {"parallel.expert_model_parallel_size": 4},
    },
    "expert_tensor": {
        "": {},
        "ETP1": {"parallel.expert_tensor_parallel_size": 1},
        "ETP2": {"parallel.expert_tensor_parallel_size": 2},
    },
    "data": {
        "": {},
        "DP2": {COPIES: 2},
        "FSDP": {COPIES: 2, "parallel.fsdp": True},
        "overlap": {COPIES: 2, "parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True},
    },
    "precision": {
        "": {},
        "bf16": {"training.precision": "bfloat16"},
        "fp16": {"training.precision": "float16", "optimizer.megatron": {"initial_loss_scale": 1024.0}},
    },
    "recompute": {
        "": {},
        "selective": {"parallel.recompute": "selective"},
        "full": {"parallel.recompute": "full"},
        "routing": {"parallel.recompute": "routing"},
    },
    "dropout": {"": {}, "dropout": {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}},
    "documents": {"": {}, "packed": {"data.reset_at_eod": True}},
    "block": {"": {}, "block3": {"model.block_length": 3}, "block24": {"model.block_length": 24}},
    "activation": {"": {}, "swiglu": {"model.ffn_activation": "swiglu"}},
    # Tokens of length 1 take large weights: the experts are cubic.
    "input": {"": {}, "normalized": {"model.slot_input": "normalized", "model.expert_init_method_std": 0.5}},
    "shared": {"": {}, "unshared": {"model.shared_expert_intermediate_size": 0}},
    "adapters": {
        "": {},
        "LoRA": {"lora.rank": 4, "lora.alpha": 8.0, "checkpoint.init_from": "weights of the seed"},
        "LoRAdrop": {
            "lora.rank": 4,
            "lora.dropout": 0.2,
            "lora.targets": ["linear_qkv", "linear_proj"],
            "checkpoint.init_from": "weights of the seed",
        },
    },
    "micro": {"": {}, "micro2": {"training.micro_batch_size": 2}},
}
MOVED = ("tensor", "sequence", "pipeline", "context", "expert", "expert_tensor", "data")
"""Factors that say where a checkpoint's tensors are."""
ROUNDED = {("precision", "bf16"), ("precision", "fp16")}
"""What is compared within wide bounds: pairs of other values meet elsewhere as well."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run and the number of processes that it is launched with.

    Attributes:
        row: a value for each factor.
        run: the settings.
        processes: to launch.
    """

    row: Row
    run: RunConfig
    processes: int

    @property
    def id(self) -> str:
        """The values that are not neutral, as in ``token-TP2-SP-DP2``."""
        return "-".join(value for value in self.row.values() if value)

    @property
    def alone(self) -> RunConfig:
        """The same in one process."""
        return dataclasses.replace(self.run, parallel=ParallelConfig())


def case_of(row: Row) -> Case:
    """What a row stands for.

    Raises:
        ConfigError: it is no valid run, or needs more processes than there are.
    """
    settings: Settings = {}
    for factor, value in row.items():
        for name, setting in FEATURES[factor][value].items():
            if settings.setdefault(name, setting) != setting:
                raise ConfigError(f"{name} is {settings[name]} and {setting} in {row}")
    copies = settings.pop(COPIES, 1)
    sections: dict[str, Settings] = {}
    for name, setting in settings.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = setting
    run = dataclasses.replace(BASE, **{name: _section(name, repr(fields)) for name, fields in sections.items()})
    processes = copies * _smallest_launch(run.parallel)
    if processes > MOST_PROCESSES:
        raise ConfigError(f"{processes} processes are more than {MOST_PROCESSES}")
    run.num_micro_batches(processes)
    return Case(row, run, processes)


@cache
def _section(name: str, fields: str) -> Any:
    """A section of the settings; checking it again and again would take most of the planning's time."""
    return dataclasses.replace(getattr(BASE, name), **ast.literal_eval(fields))


def _smallest_launch(parallel: ParallelConfig) -> int:
    """Processes of one copy of the model, or of as many as share its experts."""
    for processes in range(1, MOST_PROCESSES + 1):
        with suppress(ConfigError):
            parallel.data_parallel_size(processes)
            return processes
    raise ConfigError(f"more than {MOST_PROCESSES} processes")


def parse(text: str) -> Case:
    """The case of an id, whether or not it is planned.

    Raises:
        ConfigError: it has an unknown value, or the run is not valid.
    """
    row = {factor: next(iter(values)) for factor, values in FEATURES.items()}
    for label in text.split("-"):
        factors = [factor for factor, values in FEATURES.items() if label and label in values]
        if not factors:
            raise ConfigError(f"{label!r} of {text!r} is no value of tests/layouts/features.py")
        row[factors[0]] = label
    return case_of(row)
