"""How a model is cut over processes, and whether it can be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from steel_megatron.config.checks import at_least, divides, typed
from steel_megatron.config.model import ModelConfig
from steel_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut over processes; what is left over is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into (1F1B schedule)."""
    expert_model_parallel_size: int = 1
    """Data-parallel and context-parallel processes that share the experts of each layer."""
    sequence_parallel: bool = False
    """Whether tensor-parallel processes also share the tokens between attention and matrices (needs 2 or more)."""
    context_parallel_size: int = 1
    """Processes that share each sequence: process r has chunks r and 2 * size - 1 - r of 2 * size."""
    fsdp: bool = False
    """Whether data- and context-parallel processes shard weights and gradients too, not only the optimizer's state."""
    overlap_grad_reduce: bool | None = None
    """Whether gradients are reduced while the backward pass goes on; none means where a GPU is (fsdp always does)."""
    overlap_param_gather: bool | None = None
    """Whether updated weights are gathered while the next step begins; none means where a GPU is (fsdp always does)."""

    def __post_init__(self) -> None:
        typed(self)
        at_least(1, self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        at_least(1, self, "expert_model_parallel_size", "context_parallel_size")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "ParallelConfig.sequence_parallel is true, but tensor_model_parallel_size is 1; it shares tokens among "
                "tensor-parallel processes: set tensor_model_parallel_size to 2 or more, or sequence_parallel to false"
            )

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
        if data * self.context_parallel_size % self.expert_model_parallel_size:
            context = f" x context_parallel_size {self.context_parallel_size}" if self.context_parallel_size > 1 else ""
            raise ConfigError(
                f"expert_model_parallel_size = {self.expert_model_parallel_size} does not divide the data-parallel "
                f"size {data}{context} (= {world_size} processes / {model}); experts are shared among these processes"
            )
        return data

    def describe(self, world_size: int) -> str:
        """The layout in one word, such as ``TP2 PP1 EP1 DP1``, or with all there is ``TP2 SP PP1 CP2 EP1 DP1``."""
        sequence = "SP " if self.sequence_parallel else ""
        context = f"CP{self.context_parallel_size} " if self.context_parallel_size > 1 else ""
        return (
            f"TP{self.tensor_model_parallel_size} {sequence}PP{self.pipeline_model_parallel_size} {context}"
            f"EP{self.expert_model_parallel_size} DP{self.data_parallel_size(world_size)}{' FSDP' if self.fsdp else ''}"
        )


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise a ConfigError, with the numbers, when ``model`` cannot be cut as ``parallel`` says."""
    tensor, tensor_name = parallel.tensor_model_parallel_size, "tensor_model_parallel_size"
    divides(tensor, tensor_name, model.num_attention_heads, "num_attention_heads")
    divides(tensor, tensor_name, model.query_groups, "num_query_groups")
    divides(tensor, tensor_name, model.ffn_hidden_size, "ffn_hidden_size")
    divides(tensor, tensor_name, model.shared_expert_intermediate_size, "shared_expert_intermediate_size")
    divides(tensor, tensor_name, model.padded_vocab_size, "the padded vocabulary")
    divides(parallel.pipeline_model_parallel_size, "pipeline_model_parallel_size", model.num_layers, "num_layers")
    expert = parallel.expert_model_parallel_size
    context = parallel.context_parallel_size
    if model.ffn == "top_k_moe" and max(tensor, expert, context) > 1:
        raise ConfigError(
            f"tensor, expert and context parallel sizes are {tensor}, {expert} and {context}; ffn = top_k_moe, a "
            "baseline to compare with, is cut over pipeline stages and data-parallel processes only"
        )
    if expert > 1 and model.ffn != "soft_moe":
        raise ConfigError(f"expert_model_parallel_size = {expert}, but ffn = {model.ffn} has no experts to share")
    if model.ffn == "soft_moe":
        divides(expert, "expert_model_parallel_size", model.num_experts, "num_experts")
    _check_pieces(model, parallel)


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
