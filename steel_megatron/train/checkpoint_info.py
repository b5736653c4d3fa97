"""What a checkpoint says of itself, and whether it fits a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from steel_megatron.config import LoraConfig, ModelConfig
from steel_megatron.errors import CheckpointError

NOT_COMPUTED = {"sequence_length", "init_method_std", "expert_init_method_std", "routing_scale_init"}
NOT_COMPUTED |= {"moe_aux_loss_coeff", "moe_router_load_balancing_type", "identical_expert_init"}
NOT_COMPUTED |= {"hidden_dropout", "attention_dropout", "implementation"}
"""Settings of a model that do not change what given weights compute: these may always differ from a checkpoint's."""
ROUTING = {"routing_mode", "slot_input", "block_length", "moe_top_k"}
"""How tokens reach experts: a new run may choose it anew for the weights it begins with."""


@dataclass(frozen=True)
class Base:
    """What adapters were trained on.

    Attributes:
        path: the checkpoint's folder, where it was.
        sha256: checksum of its manifest, which has those of all files.
    """

    path: Path
    sha256: str

    def check(self, now: Base, owner: Path) -> None:
        """Raise a CheckpointError unless this is what adapters were trained on.

        Args:
            now: the base as it is.
            owner: the checkpoint with the adapters.
        """
        if now.sha256 != self.sha256:
            raise CheckpointError(
                f"{owner} holds adapters of the checkpoint {self.path} (checksum {self.sha256[:12]}); {now.path} has "
                f"{now.sha256[:12]}. They fit no other weights: put that checkpoint back, or name it in "
                "checkpoint.init_from"
            )


@dataclass(frozen=True)
class CheckpointInfo:
    """What ``steel.json`` says.

    Attributes:
        path: the checkpoint's folder.
        step: optimizer steps done.
        consumed_samples: training sequences read so far.
        model: the model's settings.
        layout: the layout that saved it, such as ``TP2 PP1 EP1 DP1``.
        world_size: number of processes that saved it.
        has_optimizer: whether it can be resumed, or holds weights only.
        has_main_weights: whether it holds float32 weights apart from the model's.
        data_fingerprint: of what the ledger says of those samples; empty if there was no ledger.
        lora: settings of the adapters; without a rank, it holds a whole model.
        base: the checkpoint with the weights that these adapt; None if it holds a whole model.
    """

    path: Path
    step: int
    consumed_samples: int
    model: ModelConfig
    layout: str
    world_size: int
    has_optimizer: bool
    has_main_weights: bool
    data_fingerprint: str
    lora: LoraConfig = field(default_factory=LoraConfig)
    base: Base | None = None


def check_model(info: CheckpointInfo, model: ModelConfig, *, resumes: bool) -> None:
    """Raise a CheckpointError that names the first setting of a checkpoint's model that ``model`` must share.

    Args:
        info: the checkpoint.
        model: the settings that its weights are wanted for.
        resumes: whether a run resumes, so that nothing it computes may change; weights that a new run starts from may
            be routed in another way.
    """
    check_settings(info.model, model, str(info.path), resumes=resumes)


def check_settings(found: ModelConfig, model: ModelConfig, origin: str, *, resumes: bool) -> None:
    """As :func:`check_model`, of settings that came from anywhere.

    Args:
        found: the settings that weights were saved with.
        model: the settings that they are wanted for.
        origin: where the weights are, for the message.
        resumes: as there.

    Raises:
        CheckpointError: a setting differs that must not.
    """
    free = NOT_COMPUTED if resumes else NOT_COMPUTED | ROUTING
    for one in dataclasses.fields(ModelConfig):
        name = {"num_query_groups": "query_groups", "megatron": "megatron_computing"}.get(one.name, one.name)
        saved, wanted = getattr(found, name), getattr(model, name)
        if one.name not in free and saved != wanted:
            raise CheckpointError(
                f"{origin} was saved with model.{one.name} = {saved}, this run has {wanted}; "
                "use the checkpoint's settings or another checkpoint.directory"
            )


def check_adapters(info: CheckpointInfo, lora: LoraConfig) -> None:
    """Raise a CheckpointError unless a checkpoint's adapters are those of a run that resumes from it."""
    for name in ("rank", "alpha", "targets"):  # dropout is none of the weights
        if info.lora.rank is None and lora.rank is None:
            return
        saved, wanted = getattr(info.lora, name), getattr(lora, name)
        if saved != wanted:
            raise CheckpointError(
                f"{info.path} was saved with lora.{name} = {saved}, this run has {wanted}; use the checkpoint's "
                "settings or another checkpoint.directory"
            )
