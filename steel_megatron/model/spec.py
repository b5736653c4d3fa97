"""Builds a process's model chunks out of megatron-core's GPTModel and the parts of this package."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from steel_megatron.config import ModelConfig, ParallelConfig, Precision
from steel_megatron.model.attention import Float32RotaryAttention
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.dropout import AFTER_ATTENTION, AFTER_FEED_FORWARD, Dropout, DropoutAdd, EmbeddingDropout
from steel_megatron.model.embedding import add_gradients_by_row
from steel_megatron.model.implementation import implementation_fields, layer_parts
from steel_megatron.model.megatron_fields import (
    check_recompute_modules,
    model_fields,
    with_further_fields,
)
from steel_megatron.model.output_layer import Labels, compute_losses_in
from steel_megatron.model.soft_moe import DenseFeedForward, ParallelSoftMoE, slot_exchange_group
from steel_megatron.model.top_k_moe import TopKMoE, top_k_moe_settings
from steel_megatron.model.weights import initialize_weights
from steel_megatron.parallel.topology import Topology
from steel_megatron.platform import LOCAL, Implementation, choose_implementation

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "routing": {},  # ParallelSoftMoE does it
}
"""Fields of megatron-core's TransformerConfig for ``parallel.recompute``."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    device: torch.device,
    chosen: Implementation = LOCAL,
    fp8: str | None = None,
) -> TransformerConfig:
    """The settings as megatron-core wants them.

    Args:
        model: the model's settings; its ``megatron`` fields are taken over.
        parallel: the sizes of the layout.
        precision: type of the weights, and of what pipeline stages send.
        device: where the weights are.
        chosen: the implementation.
        fp8: format of matrix products in FP8; None for none.

    Raises:
        ConfigError: ``model.megatron`` has a field that may not be set, or a value that megatron-core refuses.
    """
    dtype = DTYPES[precision]
    own = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        # megatron-core asks for its own MoE's number of experts before it allows expert parallelism.
        **({"num_moe_experts": model.num_experts} if parallel.expert_model_parallel_size > 1 else {}),
        **top_k_moe_settings(model, parallel, device),
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "init_method_std": model.init_method_std,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        **_pipeline_fields(model, parallel),
        **_RECOMPUTE[parallel.recompute],
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "calculate_per_token_loss": True,
        # The weights are set by initialize_weights, whose result does not depend on the layout.
        "perform_initialization": False,
        "use_cpu_initialization": device.type != "cuda",
        **implementation_fields(chosen),
        **({"fp8": fp8} if fp8 else {}),
    }
    check_recompute_modules(model.ffn, model.megatron)
    return with_further_fields(TransformerConfig, own, model.megatron, "model.megatron", model_fields(model.ffn))


def _pipeline_fields(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig: which layers are where, and how stages send."""
    fields: dict[str, Any] = {"pipeline_model_parallel_size": parallel.pipeline_model_parallel_size}
    if parallel.pipeline_layers is not None and parallel.pipeline_model_parallel_size > 1:
        parts = [["decoder"] * count for count in parallel.layers_of_chunks(model.num_layers)]
        parts[0].insert(0, "embedding")
        parts[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = parts
    if not parallel.interleaved:
        return {**fields, "deallocate_pipeline_outputs": True}
    return {
        **fields,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        # With two stages, the next one is also the one before. Sent in one batch, an activation and a gradient between
        # the same two processes are received in the wrong order: the run trains, with wrong gradients. Sent apart, each
        # in turn, they are not mixed up.
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
        # A send may still be under way when megatron-core would free its tensor.
        "deallocate_pipeline_outputs": False,
    }


def layer_spec(
    model: ModelConfig,
    groups: ProcessGroupCollection,
    documents: PackedDocuments,
    dropout: Dropout,
    *,
    recompute_routing: bool = False,
    chosen: Implementation = LOCAL,
) -> ModuleSpec:
    """One transformer layer: pre-norm attention with biases on q, k and v only, and the feed-forward layer.

    Args:
        model: the settings.
        groups: the process groups, for the feed-forward layer.
        documents: shared by the modules that keep packed documents apart.
        dropout: shared by the modules that drop something.
        recompute_routing: whether the backward pass makes slots and combine weights again.
        chosen: the implementation.
    """
    parts = layer_parts(chosen)
    feed_forward = _feed_forward_spec(model, groups, documents, recompute_routing)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.input_norm,
            self_attention=ModuleSpec(
                module=Float32RotaryAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.linear_qkv,
                    core_attention=ModuleSpec(
                        module=parts.attention, params={"documents": documents, "dropout": dropout}
                    ),
                    linear_proj=parts.linear_proj,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # Without a feed-forward layer its norm and its residual connection go as well.
            pre_mlp_layernorm=parts.norm if feed_forward else IdentityOp,
            mlp=feed_forward or IdentityOp,
            mlp_bda=get_bias_dropout_add if feed_forward else IdentityFuncOp,
            sharded_state_dict_keys_map=dict(parts.names),
        ),
    )


def _feed_forward_spec(
    model: ModelConfig, groups: ProcessGroupCollection, documents: PackedDocuments, recompute_routing: bool
) -> ModuleSpec | None:
    """What stands in the ``mlp`` slot; None for attention alone."""
    if model.ffn == "none":
        return None
    if model.ffn == "soft_moe":
        shared = {"documents": documents, "recompute_routing": recompute_routing}
        return ModuleSpec(module=ParallelSoftMoE, params={"model": model, "groups": groups, **shared})
    if model.ffn == "top_k_moe":
        return ModuleSpec(module=TopKMoE, params={"groups": groups})
    params = {"inner_size": model.ffn_hidden_size, "model": model, "groups": groups}
    return ModuleSpec(module=DenseFeedForward, params=params)


def build_model(
    model: ModelConfig, topology: Topology, precision: Precision = "float32", *, seed: int | None = None
) -> GPTModel:
    """This process's part of the model, under a layout that has one chunk on each.

    Args: as for :func:`build_chunks`.
    """
    (stage,) = build_chunks(model, topology, precision, seed=seed)
    return stage


def build_chunks(
    model: ModelConfig,
    topology: Topology,
    precision: Precision = "float32",
    *,
    seed: int | None = None,
    fp8: str | None = None,
) -> list[GPTModel]:
    """This process's parts of the model: one, or several under the interleaved schedule.

    All of them share what is set before a forward pass, ``documents``, ``labels`` and ``dropout``.

    Args:
        model: the settings.
        topology: the process groups.
        precision: type of the weights.
        seed: of the initial weights; None leaves the matrices uninitialised, to be loaded.
        fp8: format of matrix products in FP8; None for none.
    """
    chosen = choose_implementation(model.implementation, fully_sharded=topology.parallel.fsdp)
    config = transformer_config(model, topology.parallel, precision, topology.device, chosen, fp8)
    if config.sequence_parallel:
        _name_random_state()
    groups = topology.groups
    documents = PackedDocuments(slot_exchange_group(groups))
    dropout = Dropout(model.hidden_dropout, model.attention_dropout, groups, sequence_parallel=config.sequence_parallel)
    routing = topology.parallel.recompute == "routing"
    spec = layer_spec(model, groups, documents, dropout, recompute_routing=routing, chosen=chosen)
    # It warns of every feed-forward module that is not its own.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    layers = topology.parallel.layers_of_chunks(model.num_layers)[groups.pp.rank() :: groups.pp.size()]
    chunks, norm, labels = [], layer_parts(chosen).norm, Labels()
    for number, count in enumerate(layers):
        stage = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=norm),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.sequence_length,
            pre_process=topology.is_first_stage and number == 0,
            post_process=topology.is_last_stage and number == len(layers) - 1,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            pg_collection=groups,
            vp_stage=number if topology.parallel.interleaved else None,
        )
        stage.documents = documents  # set before each forward pass, see NextToken
        stage.register_forward_hook(lambda _stage, _inputs, output: documents.keep_for_backward(output))
        _add_dropout(stage, dropout)
        _mark_split_weights(stage)
        compute_losses_in(stage, model.vocab_size, labels)
        add_gradients_by_row(stage)
        if seed is not None:
            initialize_weights(stage, model, seed)
        chunks.append(stage)
    return chunks


def _add_dropout(stage: GPTModel, dropout: Dropout) -> None:
    """Put the library's dropout where megatron-core would draw its own."""
    stage.dropout = dropout  # set before each forward pass, see Engine
    stage.register_forward_hook(lambda _stage, _inputs, output: dropout.keep_for_backward(output))
    if not dropout.hidden:
        return
    if stage.pre_process:
        stage.embedding.embedding_dropout = EmbeddingDropout(dropout)
    for layer in stage.decoder.layers:
        layer.self_attn_bda = DropoutAdd(dropout, layer.layer_number, AFTER_ATTENTION)
        if layer.mlp_bda is get_bias_dropout_add:
            layer.mlp_bda = DropoutAdd(dropout, layer.layer_number, AFTER_FEED_FORWARD)


def _name_random_state() -> None:
    """megatron-core's layers run under a random state of this name where tokens are shared; nothing draws from it."""
    tracker, name = get_cuda_rng_tracker(), "model-parallel-rng"
    if name not in tracker.get_states():
        tracker.add(name, 0)


def _mark_split_weights(stage: GPTModel) -> None:
    """Say which weights are parts of larger ones.

    megatron-core marks them while it initialises them, which it does not do here, and from 0.19 on in any case; without
    the mark, the gradient norm would count only the first process's part.
    """
    split_dims = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in stage.modules():
        if type(module) in split_dims and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, split_dims[type(module)], 1)
