"""How a model is cut over processes, and whether it can be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from steel_megatron.config.checks import at_least, divides, one_of, typed
from steel_megatron.config.model import ModelConfig
from steel_megatron.errors import ConfigError

Recompute = Literal["none", "selective", "full", "routing"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut over processes; what is left over is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into (1F1B schedule)."""
    virtual_pipeline_model_parallel_size: int = 1
    """Model chunks of each stage; 2 or more take turns (interleaved 1F1B schedule, with a shorter pipeline bubble)."""
    pipeline_layers: list[int] | None = None
    """Layers of each stage, or of each chunk in the order of the layers; 0 is possible for the first (embedding only)
    and the last (output layer only). None means equally many for all."""
    expert_model_parallel_size: int = 1
    """Processes that share the experts of each layer: data- and context-parallel ones, and tensor-parallel ones where
    expert_tensor_parallel_size is smaller than tensor_model_parallel_size."""
    expert_tensor_parallel_size: int | None = None
    """Processes that share the matrices of each expert; none means tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Whether tensor-parallel processes also share the tokens between attention and matrices (needs 2 or more)."""
    context_parallel_size: int = 1
    """Processes that share each sequence: process r has chunks r and 2 * size - 1 - r of 2 * size."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it in memory: nothing, attention (selective), whole
    layers (full), or the routing of Soft-MoE layers without their experts (routing)."""
    fsdp: bool = False
    """Whether data- and context-parallel processes shard weights and gradients too, not only the optimizer's state."""
    overlap_grad_reduce: bool | None = None
    """Whether gradients are reduced while the backward pass goes on; none means where a GPU is (fsdp always does)."""
    overlap_param_gather: bool | None = None
    """Whether updated weights are gathered while the next step begins; none means where a GPU is (fsdp always does)."""

    def __post_init__(self) -> None:
        typed(self)
        at_least(1, self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        at_least(1, self, "expert_model_parallel_size", "context_parallel_size", "expert_tensor_parallel_size")
        at_least(1, self, "virtual_pipeline_model_parallel_size")
        one_of(("none", "selective", "full", "routing"), self, "recompute")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "ParallelConfig.sequence_parallel is true, but tensor_model_parallel_size is 1; it shares tokens among "
                "tensor-parallel processes: set tensor_model_parallel_size to 2 or more, or sequence_parallel to false"
            )
        if self.interleaved and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                "ParallelConfig.virtual_pipeline_model_parallel_size is "
                f"{self.virtual_pipeline_model_parallel_size}, but pipeline_model_parallel_size is 1: there are no "
                "stages whose chunks could take turns; set pipeline_model_parallel_size to 2 or more"
            )
        self._check_overlap()

    def _check_overlap(self) -> None:
        """Raise a ConfigError for options of overlap that do nothing."""
        if self.overlap_param_gather and self.overlap_grad_reduce is False:
            raise ConfigError(
                "ParallelConfig.overlap_param_gather is True with overlap_grad_reduce = False, without which all "
                "weights are one bucket that nothing overlaps with; leave overlap_grad_reduce unset"
            )
        for name in ("overlap_grad_reduce", "overlap_param_gather"):
            if self.fsdp and getattr(self, name) is not None:
                raise ConfigError(
                    f"ParallelConfig.{name} is {getattr(self, name)} with fsdp = True, which gathers weights and "
                    "reduces gradients layer by layer in its own way; leave it unset"
                )

    @property
    def interleaved(self) -> bool:
        """Whether the stages of the pipeline have several model chunks."""
        return self.virtual_pipeline_model_parallel_size > 1

    @property
    def pipeline_chunks(self) -> int:
        """Parts that the layers are cut into: the chunks of all stages."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    def layers_of_chunks(self, num_layers: int) -> list[int]:
        """The number of layers in each chunk, in the order of the layers: chunk c is chunk c // PP of stage c % PP.

        Raises:
            ConfigError: the layers cannot be cut so.
        """
        if self.pipeline_layers is not None:
            _check_pipeline_layers(self, num_layers)
            return list(self.pipeline_layers)
        if num_layers % self.pipeline_chunks:
            virtual = f" x virtual_pipeline_model_parallel_size = {self.pipeline_chunks}" if self.interleaved else ""
            raise ConfigError(
                f"num_layers = {num_layers} is not divisible by pipeline_model_parallel_size"
                f"{virtual or f' = {self.pipeline_model_parallel_size}'}; parallel.pipeline_layers may say how many "
                "layers each has"
            )
        return [num_layers // self.pipeline_chunks] * self.pipeline_chunks

    @property
    def expert_tensor_size(self) -> int:
        """Processes that share the matrices of each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def sequence_parallel_size(self) -> int:
        """Tensor-parallel processes that share the tokens of each sequence."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a launch of ``world_size`` processes that read different samples.

        Raises:
            ConfigError: the launch does not fit the degrees.
        """
        names, sizes = "tensor x pipeline", [self.tensor_model_parallel_size, self.pipeline_model_parallel_size]
        if self.context_parallel_size > 1:
            names, sizes = names + " x context", [*sizes, self.context_parallel_size]
        model = math.prod(sizes)
        if world_size % model:
            raise ConfigError(
                f"a launch of {world_size} processes does not fit {names} parallel = "
                f"{' x '.join(map(str, sizes))} = {model}; the number of processes must be a multiple of {model}"
            )
        data = world_size // model
        self._check_experts(data, world_size, model)
        return data

    def _check_experts(self, data: int, world_size: int, model: int) -> None:
        """Raise a ConfigError when the processes of a pipeline stage cannot share the experts as the degrees say."""
        tensor, expert_tensor = self.tensor_model_parallel_size, self.expert_tensor_size
        if expert_tensor != tensor:
            stage, experts = tensor * self.context_parallel_size * data, expert_tensor * self.expert_model_parallel_size
            if stage % experts:
                raise ConfigError(
                    f"expert_tensor_parallel_size x expert_model_parallel_size = {expert_tensor} x "
                    f"{self.expert_model_parallel_size} = {experts} does not divide the {stage} processes of a "
                    f"pipeline stage (tensor x context x data parallel = {tensor} x {self.context_parallel_size} x "
                    f"{data}), which share its experts"
                )
        elif data * self.context_parallel_size % self.expert_model_parallel_size:
            context = f" x context_parallel_size {self.context_parallel_size}" if self.context_parallel_size > 1 else ""
            raise ConfigError(
                f"expert_model_parallel_size = {self.expert_model_parallel_size} does not divide the data-parallel "
                f"size {data}{context} (= {world_size} processes / {model}); experts are shared among these processes"
            )

    def describe(self, world_size: int) -> str:
        """The layout in one word, such as ``TP2 PP1 EP1 DP1``, or with all there is ``TP2 SP PP1 CP2 EP1 DP1``."""
        sequence = "SP " if self.sequence_parallel else ""
        context = f"CP{self.context_parallel_size} " if self.context_parallel_size > 1 else ""
        virtual = f"VPP{self.virtual_pipeline_model_parallel_size} " if self.interleaved else ""
        apart = self.expert_tensor_size != self.tensor_model_parallel_size
        expert_tensor = f"ETP{self.expert_tensor_size} " if apart else ""
        return (
            f"TP{self.tensor_model_parallel_size} {sequence}PP{self.pipeline_model_parallel_size} {virtual}{context}"
            f"EP{self.expert_model_parallel_size} {expert_tensor}DP{self.data_parallel_size(world_size)}"
            f"{' FSDP' if self.fsdp else ''}"
        )


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise a ConfigError, with the numbers, when ``model`` cannot be cut as ``parallel`` says."""
    tensor, tensor_name = parallel.tensor_model_parallel_size, "tensor_model_parallel_size"
    divides(tensor, tensor_name, model.num_attention_heads, "num_attention_heads")
    divides(tensor, tensor_name, model.query_groups, "num_query_groups")
    divides(tensor, tensor_name, model.shared_expert_intermediate_size, "shared_expert_intermediate_size")
    divides(tensor, tensor_name, model.padded_vocab_size, "the padded vocabulary")
    parallel.layers_of_chunks(model.num_layers)  # checks
    if model.ffn in ("soft_moe", "top_k_moe"):
        _check_experts(model, parallel)
    else:
        divides(tensor, tensor_name, model.ffn_hidden_size, "ffn_hidden_size")
        expert, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
        if expert > 1:
            raise ConfigError(f"expert_model_parallel_size = {expert}, but ffn = {model.ffn} has no experts to share")
        if expert_tensor is not None and expert_tensor != tensor:
            raise ConfigError(f"expert_tensor_parallel_size = {expert_tensor}, but ffn = {model.ffn} has no experts")
    _check_pieces(model, parallel)
    _check_recompute(model, parallel)


def _check_recompute(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise a ConfigError when the model has nothing of what is to be computed again, or another setting says it."""
    if parallel.recompute == "routing" and model.ffn != "soft_moe":
        raise ConfigError(
            f"parallel.recompute is routing, but model.ffn is {model.ffn}: only soft_moe layers can have their routing "
            "computed again; use selective or full"
        )
    fields = [name for name in model.megatron if name.startswith("recompute_")]
    if parallel.recompute != "none" and fields:
        raise ConfigError(
            f"parallel.recompute is {parallel.recompute}, and model.megatron.{fields[0]} is "
            f"{model.megatron[fields[0]]!r}; set one of them: parallel.recompute none leaves it to model.megatron"
        )


def _check_pipeline_layers(parallel: ParallelConfig, num_layers: int) -> None:
    """Raise a ConfigError, with the arithmetic, when ``pipeline_layers`` does not fit the stages and the layers."""
    layers = parallel.pipeline_layers
    assert layers is not None
    given = f"parallel.pipeline_layers = {layers}"
    sizes, names = [parallel.pipeline_model_parallel_size], "pipeline_model_parallel_size"
    if parallel.interleaved:
        sizes.append(parallel.virtual_pipeline_model_parallel_size)
        names += " x virtual_pipeline_model_parallel_size"
    if len(layers) != parallel.pipeline_chunks:
        product = f" ({' x '.join(map(str, sizes))})" if parallel.interleaved else ""
        raise ConfigError(
            f"{given} has {len(layers)} entries; {names} = {parallel.pipeline_chunks}{product} needs one each"
        )
    for number, count in enumerate(layers):
        if count < 0:
            raise ConfigError(f"{given}: entry {number} is {count}; a number of layers is at least 0")
        if count == 0 and 0 < number < len(layers) - 1:
            raise ConfigError(
                f"{given}: entry {number} is 0; only the first part (embedding) and the last (output layer) have "
                "something to compute without layers"
            )
    if sum(layers) != num_layers:
        raise ConfigError(
            f"{given} has {' + '.join(map(str, layers))} = {sum(layers)} layers; model.num_layers is {num_layers}"
        )


def _check_experts(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise a ConfigError when the experts of a layer cannot be cut."""
    divides(parallel.expert_model_parallel_size, "expert_model_parallel_size", model.num_experts, "num_experts")
    given = parallel.expert_tensor_parallel_size is not None
    name = "expert_tensor_parallel_size" if given else "tensor_model_parallel_size"
    divides(parallel.expert_tensor_size, name, model.ffn_hidden_size, "ffn_hidden_size")
    tensor = parallel.tensor_model_parallel_size
    if model.ffn == "top_k_moe" and tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"tensor_model_parallel_size = {tensor} without sequence_parallel; with ffn = top_k_moe all {tensor} "
            f"processes would send the same tokens to the experts, which would compute each {tensor} times: set "
            "sequence_parallel to true"
        )


def _check_pieces(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise a ConfigError when sequences cannot be cut into the chunks of context and sequence parallelism."""
    context, sharing = parallel.context_parallel_size, parallel.sequence_parallel_size
    cuts = []  # numbers of equal chunks that sequences are cut into, with their names
    if context > 1:
        cuts.append((2 * context, f"2 x context_parallel_size = {2 * context}"))
    if sharing > 1:
        name = "tensor_model_parallel_size" if context == 1 else "tensor_model_parallel_size x context_parallel_size"
        cuts.append((sharing * context, f"{name} = {sharing * context} (sequence_parallel)"))
    for pieces, name in cuts:
        if model.sequence_length % pieces:
            raise ConfigError(f"sequence_length = {model.sequence_length} is not divisible by {name}")
        if model.routing is None:
            continue
        if not model.routing.splits_sequences:
            raise ConfigError(
                f"routing_mode {model.routing_mode} has no forward_split, so it cannot compute sequences that "
                f"processes share, by {name}; set context_parallel_size to 1 and sequence_parallel to false"
            )
        model.routing.check_chunks(model, model.sequence_length // pieces, pieces, name)
