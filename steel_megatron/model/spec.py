"""Builds one pipeline stage of the model out of megatron-core's GPTModel and the parts of this package."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

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
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from steel_megatron.config import ModelConfig, ParallelConfig, Precision
from steel_megatron.errors import ConfigError
from steel_megatron.model.attention import Float32, RMSNorm, ScaledDotProductAttention
from steel_megatron.model.documents import PackedDocuments
from steel_megatron.model.dropout import AFTER_ATTENTION, AFTER_FEED_FORWARD, Dropout, DropoutAdd, EmbeddingDropout
from steel_megatron.model.megatron_fields import (
    check_recompute_modules,
    model_fields,
    with_further_fields,
)
from steel_megatron.model.soft_moe import DenseFeedForward, ParallelSoftMoE
from steel_megatron.model.top_k_moe import TopKMoE, top_k_moe_settings
from steel_megatron.model.weights import initialize_weights
from steel_megatron.parallel.topology import Topology

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


_TRANSFORMER_ENGINE = "transformer_engine"
"""In the names of the modules that its layers come from."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    device: torch.device,
    fp8: str | None = None,
) -> TransformerConfig:
    """The settings as megatron-core wants them.

    Args:
        model: the model's settings; its ``megatron`` fields are taken over.
        parallel: the sizes of the layout.
        precision: type of the weights, and of what pipeline stages send.
        device: where the weights are.
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
        **top_k_moe_settings(model),
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
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "calculate_per_token_loss": True,
        "deallocate_pipeline_outputs": True,
        # The weights are set by initialize_weights, whose result does not depend on the layout.
        "perform_initialization": False,
        "use_cpu_initialization": device.type != "cuda",
        # Fusions of transformer-engine and apex that torch does not have.
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        **({"fp8": fp8} if fp8 else {}),
    }
    check_recompute_modules(model.ffn, model.megatron)
    return with_further_fields(TransformerConfig, own, model.megatron, "model.megatron", model_fields(model.ffn))


def layer_spec(
    model: ModelConfig, groups: ProcessGroupCollection, documents: PackedDocuments, dropout: Dropout
) -> ModuleSpec:
    """One transformer layer: pre-norm attention with biases on q, k and v only, and the feed-forward layer.

    Args:
        model: the settings.
        groups: the process groups, for the feed-forward layer.
        documents: shared by the modules that keep packed documents apart.
        dropout: shared by the modules that drop something.
    """
    feed_forward = _feed_forward_spec(model, groups, documents)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=ModuleSpec(
                        module=ScaledDotProductAttention, params={"documents": documents, "dropout": dropout}
                    ),
                    linear_proj=RowParallelLinear,
                    q_layernorm=Float32,
                    k_layernorm=Float32,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # Without a feed-forward layer its norm and its residual connection go as well.
            pre_mlp_layernorm=RMSNorm if feed_forward else IdentityOp,
            mlp=feed_forward or IdentityOp,
            mlp_bda=get_bias_dropout_add if feed_forward else IdentityFuncOp,
        ),
    )


def _feed_forward_spec(
    model: ModelConfig, groups: ProcessGroupCollection, documents: PackedDocuments
) -> ModuleSpec | None:
    """What stands in the ``mlp`` slot; None for attention alone."""
    if model.ffn == "none":
        return None
    if model.ffn == "soft_moe":
        return ModuleSpec(module=ParallelSoftMoE, params={"model": model, "groups": groups, "documents": documents})
    if model.ffn == "top_k_moe":
        return ModuleSpec(module=TopKMoE, params={"groups": groups})
    params = {"inner_size": model.ffn_hidden_size, "model": model, "groups": groups}
    return ModuleSpec(module=DenseFeedForward, params=params)


def build_model(
    model: ModelConfig,
    topology: Topology,
    precision: Precision = "float32",
    *,
    seed: int | None = None,
    fp8: str | None = None,
) -> GPTModel:
    """This process's part of the model.

    Args:
        model: the settings.
        topology: the process groups.
        precision: type of the weights.
        seed: of the initial weights; None leaves the matrices uninitialised, to be loaded.
        fp8: format of matrix products in FP8; None for none.

    Raises:
        ConfigError: ``fp8`` is set, and no layer of the model is transformer-engine's.
    """
    config = transformer_config(model, topology.parallel, precision, topology.device, fp8)
    if config.sequence_parallel:
        _name_random_state()
    groups = topology.groups
    documents = PackedDocuments(groups.ep)
    dropout = Dropout(model.hidden_dropout, model.attention_dropout, groups, sequence_parallel=config.sequence_parallel)
    spec = layer_spec(model, groups, documents, dropout)
    # It warns of every feed-forward module that is not its own.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    block = TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, pp_rank=groups.pp.rank()), layer_norm=RMSNorm
    )
    stage = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.sequence_length,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        pg_collection=groups,
    )
    if fp8 and not any(_TRANSFORMER_ENGINE in type(module).__module__ for module in stage.modules()):
        raise ConfigError(
            f"training.fp8 = {fp8} has no effect on this model: only transformer-engine's layers compute in FP8, and "
            "it has none"
        )
    stage.documents = documents  # set before each forward pass, see NextToken
    stage.register_forward_hook(lambda _stage, _inputs, output: documents.keep_for_backward(output))
    _add_dropout(stage, dropout)
    _mark_split_weights(stage)
    if seed is not None:
        initialize_weights(stage, model, seed)
    return stage


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

    megatron-core marks them while it initialises them, which it does not do here; without the mark, the gradient
    norm would count only the first process's part.
    """
    split_dims = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in stage.modules():
        if type(module) in split_dims:
            set_tensor_model_parallel_attributes(module.weight, True, split_dims[type(module)], 1)
