"""The audit itself.

A model is computed in two ways: by the library's own stage, which trains it, and by the exported
model code, which decodes it. Both are audited layer by layer (:mod:`steel_megatron.model.causality`), their
logits are compared, and decoding with a cache is held to the full forward. Everything runs in float32 on one
process, whatever the weights were saved in: what is audited is the function, not the type it runs in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from megatron.core.models.gpt import GPTModel

from steel_megatron.audit.decoding import DECODED, cached_decoding, difference, prompts_for, published_decoding
from steel_megatron.audit.report import TEXTS, AuditReport, ExportedAudit, blocks_of
from steel_megatron.audit.sources import Subject, open_subject
from steel_megatron.config import ModelConfig
from steel_megatron.errors import ConfigError, SteelError
from steel_megatron.hf.configuration_steel import SteelConfig
from steel_megatron.hf.mapping import (
    FFN_TYPES,
    Tensors,
    config_to_hf,
    from_hf,
    published_shapes,
    why_not_exportable,
)
from steel_megatron.hf.modeling_steel import SteelForCausalLM
from steel_megatron.model.causality import (
    LOGITS,
    TOLERANCE,
    Causality,
    Forward,
    audit_model,
    check_positions,
    default_positions,
    stage_outputs,
    watch,
)
from steel_megatron.model.spec import build_model
from steel_megatron.model.weights import sharded_weights
from steel_megatron.parallel.topology import Topology, initialize_alone
from steel_megatron.platform import prepare

GIB = 2**30


def audit(
    path: Path,
    *,
    length: int | None = None,
    positions: Sequence[int] = (),
    seed: int = 0,
    tolerance: float | None = None,
    layers: int | None = None,
) -> AuditReport:
    """Find out whether a model's tokens see later ones.

    Args:
        path: a checkpoint's folder, a Hugging Face folder, or a YAML file with the settings of a run or of a model.
        length: tokens of a text; None for two blocks and some more.
        positions: tokens to change; none for the first, the last, and those inside and at the edges of blocks.
        seed: of texts and replacements, and of the weights where settings are audited.
        tolerance: movement in standard deviations that counts as rounding; None for 1e-5.
        layers: audit the first layers only, of a model that does not fit into memory.

    Raises:
        CheckpointError: the folder is not a whole model, or its weights give values that are not finite.
        ConfigError: the settings are wrong, or the model does not fit into memory.
    """
    platform = prepare()
    subject = open_subject(path, seed)
    tolerance = TOLERANCE if tolerance is None else tolerance
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance = {tolerance} must be 0 or more, and finite")
    model = _first_layers(path, subject.model, layers)
    if length is None:
        length = min(model.sequence_length, 2 * (blocks_of(model) or DECODED) + DECODED)
    if not 2 <= length <= model.sequence_length:
        raise ConfigError(f"length = {length}; texts for {path} have 2 to sequence_length = {model.sequence_length}")
    chosen = tuple(positions or default_positions(length, blocks_of(model)))
    check_positions(chosen, length)
    _check_memory(path, model, length, platform.device)
    topology = initialize_alone("an audit")
    stage, exported = _build(path, subject, model, topology)

    def measure(forward: Forward) -> Causality:
        try:
            return audit_model(
                forward,
                vocab_size=model.vocab_size,
                length=length,
                positions=chosen,
                texts=TEXTS,
                seed=seed,
                tolerance=tolerance,
                device=topology.device,
            )
        except SteelError as error:
            raise type(error)(f"{path}: {error}") from None

    own = stage_outputs(stage, model.vocab_size)
    return AuditReport(
        path=str(path),
        kind=subject.kind,
        model=model,
        parameters=_count(model) if exported else sum(weight.numel() for weight in stage.parameters()),
        length=length,
        positions=chosen,
        seed=seed,
        library=measure(own),
        exported=None if exported is None else _audit_exported(exported, model, own, measure, length, seed, topology),
    )


def _build(
    path: Path, subject: Subject, model: ModelConfig, topology: Topology
) -> tuple[GPTModel, SteelForCausalLM | None]:
    """The library's stage, and the exported form where there is one.

    Raises:
        CheckpointError: the weights are not whole, or not those of the settings.
    """
    stage = build_model(model, topology)
    if not _has_published_weights(model):
        if model.num_layers != subject.model.num_layers:
            raise ConfigError(f"layers = {model.num_layers}: a model with ffn = {model.ffn} is audited whole")
        subject.fill(stage)
        return stage.eval(), None
    names = published_shapes(model)
    weights = {name: tensor.float() for name, tensor in subject.load().items() if name in names}
    _set_weights(stage, from_hf(weights, model, str(path)))
    if why_not_exportable(model) is not None:
        return stage.eval(), None
    # The exported code around these very tensors.
    with torch.device("meta"):
        exported = SteelForCausalLM(SteelConfig(**config_to_hf(model)))
    exported.load_state_dict({name: tensor.to(topology.device) for name, tensor in weights.items()}, assign=True)
    return stage.eval(), exported.eval()


def _has_published_weights(model: ModelConfig) -> bool:
    return model.ffn in FFN_TYPES.values()


def _audit_exported(
    exported: SteelForCausalLM,
    model: ModelConfig,
    library: Forward,
    measure: Callable[[Forward], Causality],
    length: int,
    seed: int,
    topology: Topology,
) -> ExportedAudit:
    def full(ids: torch.Tensor) -> torch.Tensor:
        return exported(input_ids=ids, use_cache=False).logits

    ids = torch.randint(model.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed + 1))
    ids = ids.to(topology.device)
    prompts = prompts_for(model, length)
    with torch.no_grad():
        return ExportedAudit(
            causality=measure(watch(full, exported.model.layers)),
            agreement=difference([full(ids)], [library(ids)[LOGITS]]),
            decoding=(cached_decoding if model.causal else published_decoding)(exported, ids, prompts),
            prompts=prompts,
        )


def _first_layers(path: Path, model: ModelConfig, layers: int | None) -> ModelConfig:
    if layers is not None and not 1 <= layers <= model.num_layers:
        raise ConfigError(f"layers = {layers}; {path} has 1 to {model.num_layers} to audit")
    return dataclasses.replace(model, num_layers=layers or model.num_layers)


def _check_memory(path: Path, model: ModelConfig, length: int, device: torch.device) -> None:
    """Refuse a model that would fill the memory: the machine would swap or kill instead of telling."""
    if not _has_published_weights(model):
        return  # a baseline to compare with, and small
    parameters = _count(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    # Both forms of the model and one on its way; logits of the texts, before and after, and their difference.
    activations = TEXTS * length * (4 * model.padded_vocab_size + 2 * model.num_layers * model.hidden_size)
    needed = 4 * (3 * parameters + activations)
    if needed > free:
        per_layer = _count(dataclasses.replace(model, num_layers=model.num_layers + 1)) - parameters
        raise ConfigError(
            f"{path} has {parameters:,} parameters; the audit needs about {needed / GIB:,.1f} GiB in float32 and "
            f"{free / GIB:,.1f} GiB are free. Audit fewer layers (--layers N; one has {per_layer:,} parameters), or "
            "use a machine with more memory"
        )


def _count(model: ModelConfig) -> int:
    """The model's parameters, embeddings included."""
    return sum(math.prod(shape) for shape in published_shapes(model).values())


def _set_weights(stage: GPTModel, own: Tensors) -> None:
    """Weights by the library's names, with the layers as first axis, into a whole stage."""
    with torch.no_grad():
        for sharded in sharded_weights(stage).values():
            sharded.data.copy_(own[sharded.key][sharded.global_offset[: sharded.prepend_axis_num]])
