"""Which implementation is chosen, what it puts into a layer, and that each loads what another one saved.

transformer-engine's modules need a GPU. Here stand-ins with the names of their weights take their place.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steel_megatron.cli import main
from steel_megatron.config import RunConfig
from steel_megatron.data.indexed.writer import IndexedWriter
from steel_megatron.errors import ConfigError
from steel_megatron.platform import LOCAL, Implementation, Platform, choose_implementation, prepare
from tests import needs
from tests.distributed import run_distributed
from tests.train.small_run import LAYOUTS, MODEL, small_run, train

prepare()
CPU = Platform(torch.device("cpu"), "gloo", None, None, False, False)
BARE = Platform(torch.device("cuda"), "nccl", None, None, False, False)
FULL = Platform(torch.device("cuda"), "nccl", None, "2.20.2", True, True)
RECIPE = Path(__file__).resolve().parents[2] / "examples/quickstart/pretrain.yaml"


def test_auto_takes_what_is_there() -> None:
    assert choose_implementation("auto", CPU) == choose_implementation("local", CPU) == LOCAL
    assert choose_implementation("auto", BARE) == LOCAL
    assert choose_implementation("auto", FULL) == Implementation("2.20.2", False, True)
    assert choose_implementation("transformer_engine", FULL) == choose_implementation("auto", FULL)
    assert choose_implementation("local", FULL) == Implementation(None, True, True)
    without = dataclasses.replace(FULL, apex_norm=False, apex_gradients=False)
    assert choose_implementation("auto", without) == Implementation("2.20.2")


def test_one_line_says_what_is_used() -> None:
    assert LOCAL.describe() == "implementation: local (torch's attention, torch's norms)"
    assert choose_implementation("local", FULL).describe() == (
        "implementation: local (torch's attention, apex's norms), gradients accumulated by apex"
    )
    assert "transformer_engine 2.20.2" in choose_implementation("auto", FULL).describe()


def test_transformer_engine_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match=r"transformer_engine, which needs a GPU, and torch finds none; set it to"):
        choose_implementation("transformer_engine", CPU)
    with pytest.raises(ConfigError, match=r"transformer_engine, which is not installed; install it \(pip install"):
        choose_implementation("transformer_engine", BARE)


@needs.no_gpu.mark
def test_a_run_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("train", "validation")):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document((np.arange(2000) + seed) % 100)
            writer.finalize({})
    before = sorted(tmp_path.iterdir())
    fits = ["--data.train", str(tmp_path / "train"), "--data.validation", str(tmp_path / "validation")]
    fits += ["--data.tokenizer_path", "null"]
    fits += ["--parallel.tensor_model_parallel_size", "1"]
    assert main(["pretrain", "--config", str(RECIPE), "--model.implementation", "transformer_engine", *fits]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "model.implementation is transformer_engine" in lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_the_parts_of_each_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp

    from steel_megatron.model import implementation
    from steel_megatron.model.attention import RMSNorm, ScaledDotProductAttention

    local = implementation.layer_parts(LOCAL)
    assert local == implementation.LayerParts(
        RMSNorm, ColumnParallelLinear, ScaledDotProductAttention, RowParallelLinear, RMSNorm
    )
    assert implementation.layer_parts(Implementation(apex_norm=True)).norm is implementation.ApexRMSNorm
    fused = implementation.layer_parts(Implementation("2.20.2"))
    assert fused.input_norm is IdentityOp and fused.attention is implementation.FusedAttention
    assert fused.linear_qkv is provider.TELayerNormColumnParallelLinear
    assert fused.linear_proj is provider.TERowParallelLinear and fused.norm is provider.TENorm
    assert fused.names == {"self_attention.linear_qkv.layer_norm_": "input_layernorm."}
    fields = implementation.implementation_fields(Implementation("2.20.2", fused_gradients=True))
    assert fields["apply_rope_fusion"] and fields["gradient_accumulation_fusion"]
    assert not any(implementation.implementation_fields(LOCAL).values())


def test_weights_that_are_only_read_need_no_transformer_engine() -> None:
    from steel_megatron.model.megatron_fields import without_ineffective_fields

    model = dataclasses.replace(MODEL, implementation="transformer_engine")
    assert without_ineffective_fields(model).implementation == "local"


# ---- checkpoints of both implementations ----


def stand_in_parts(chosen: Implementation) -> Any:
    """transformer-engine's part names on megatron-core's own layers."""
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    from steel_megatron.model import implementation
    from steel_megatron.model.attention import RMSNorm, ScaledDotProductAttention

    class NormAndLinear(ColumnParallelLinear):
        """Names, order and shards of the weights of TELayerNormColumnParallelLinear."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            shape, eps = self.layer_norm_weight.shape, self.config.layernorm_epsilon
            normed = F.rms_norm(x.float(), shape, eps=eps).to(x.dtype) * self.layer_norm_weight
            return super().forward(normed, *args, **kwargs)

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
            state = self.state_dict(prefix="", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(
                state,
                prefix,
                {"weight": 0, "bias": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )

    return implementation.LayerParts(
        IdentityOp, NormAndLinear, ScaledDotProductAttention, RowParallelLinear, RMSNorm, implementation.FUSED_NAMES
    )


def train_with(fused: bool, run: RunConfig, first: int, last: int, save: bool = False, load: bool = False) -> Any:
    from steel_megatron.model import spec

    if fused:
        spec.layer_parts = stand_in_parts
    return train(run, first, last, save, load)


@pytest.mark.slow
@pytest.mark.parametrize("fused_first", [True, False])
def test_each_implementation_resumes_from_the_other_one(fused_first: bool, tmp_path: Path) -> None:
    from steel_megatron.train.checkpoint_tensors import TensorFiles

    straight = run_distributed(train, 1, small_run(LAYOUTS["dp2"], steps=4, num_layers=2))[0]
    for name, first, fused in (("tp2 sp", 1, fused_first), ("pp2", 3, not fused_first)):
        run = small_run(LAYOUTS[name], str(tmp_path), steps=4, num_layers=2)
        results = run_distributed(train_with, 2, fused, run, first, first + 1, first == 1, first != 1)
        losses = [[step.loss for step in rank[:-1]] for rank in results]
        norms = [[step.grad_norm for step in rank[:-1]] for rank in results]
        wanted = straight[first - 1 : first + 1]
        assert losses == [pytest.approx([step.loss for step in wanted], rel=1e-5)] * 2
        assert norms == [pytest.approx([step.grad_norm for step in wanted], rel=1e-5)] * 2
    names = set(TensorFiles(run.checkpoints_dir / "step_00000002").tensors)
    norm = "decoder.layers.input_layernorm.weight"
    assert {norm, f"optimizer.state.exp_avg.{norm}"} <= names
    assert not any("layer_norm_weight" in name for name in names)
    manifest = json.loads((run.checkpoints_dir / "step_00000002/steel.json").read_text())
    assert "implementation" not in manifest["model"]  # so that earlier versions read it as well


def seen_by_megatron(stage: Any) -> dict[str, Any]:
    """Of each weight by its name in checkpoints: shape, type, initial values, and marks that megatron-core reads."""
    from steel_megatron.model.weights import sharded_weights

    marks = ("sequence_parallel", "tensor_model_parallel", "partition_dim")
    return {
        one.key + str(one.global_offset): (
            tuple(one.global_shape),
            one.data.dtype,
            one.data.float().sum().item(),
            [getattr(one.data, name, None) for name in marks],
        )
        for one in sharded_weights(stage).values()
    }


def build_both() -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What there is of the weights in both implementations, and the names of the second one's own."""
    from steel_megatron.model import spec
    from steel_megatron.parallel.topology import initialize

    topology = initialize(LAYOUTS["tp2 sp"])
    local = spec.build_model(MODEL, topology, "bfloat16", seed=1)
    spec.choose_implementation = lambda wanted, **_: Implementation("of this machine")
    if not torch.cuda.is_available():  # its modules ask before they are built; what they are told computes nothing
        answers: Any = type("Properties", (), {"major": 9, "minor": 0, "multi_processor_count": 132, "name": "none"})
        torch.cuda.is_available = lambda: True
        torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
        torch.cuda.get_device_capability = lambda *_: (9, 0)
        torch.cuda.get_device_properties = lambda *_: answers
    fused = spec.build_model(MODEL, topology, "bfloat16", seed=1)
    names = [type(module).__name__ for module in fused.decoder.layers[0].self_attention.children()]
    return seen_by_megatron(local), seen_by_megatron(fused), names


@needs.transformer_engine.mark
def test_weights_of_transformer_engine_itself_are_the_same_to_checkpoints_and_optimizer() -> None:
    for local, fused, names in run_distributed(build_both, 2):
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "FusedAttention"} <= set(names)
        assert fused == local


# ---- the adapters ----


def test_apex_computes_the_same_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer import TransformerConfig

    from steel_megatron.model.attention import RMSNorm
    from steel_megatron.model.implementation import ApexRMSNorm

    def fused_rms_norm_affine(x: torch.Tensor, weight: torch.Tensor, shape: Any, eps: float = 1e-6) -> torch.Tensor:
        return F.rms_norm(x, shape, weight, eps)

    kernel = ModuleType("apex.normalization.fused_layer_norm")
    kernel.fused_rms_norm_affine = fused_rms_norm_affine  # type: ignore[attr-defined]
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True)
    ours, theirs = RMSNorm(config, 8, 1e-3), ApexRMSNorm(config, 8, 1e-3)
    assert list(theirs.state_dict()) == list(ours.state_dict()) == ["weight"]
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(0.5, 2, 8))
    torch.testing.assert_close(theirs(x), ours(x))


@pytest.mark.parametrize("case", ["plain", "float32", "documents", "dropout", "evaluation"])
def test_fused_attention_is_used_where_it_computes_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.enums import AttnMaskType

    from steel_megatron.model import implementation

    calls: list[Any] = []

    class Kernel(torch.nn.Module):
        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__()
            assert kwargs["attention_dropout"] == 0.0 and "documents" not in kwargs and kwargs["layer_number"] == 1

        def forward(self, query: torch.Tensor, *rest: Any) -> torch.Tensor:
            calls.append((query.dtype, rest[0].dtype, rest[2:]))
            return torch.zeros(query.size(0), query.size(1), query.size(2) * query.size(3), dtype=query.dtype)

    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", Kernel)
    plain = implementation.ScaledDotProductAttention.forward
    monkeypatch.setattr(
        implementation.ScaledDotProductAttention, "forward", lambda self, *arguments: calls.append("local") or plain
    )
    from types import SimpleNamespace

    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True)
    attention = implementation.FusedAttention(
        config,
        documents=SimpleNamespace(document_starts=torch.zeros(1) if case == "documents" else None),
        dropout=SimpleNamespace(attention=0.1 if case in ("dropout", "evaluation") else 0.0),
        layer_number=1,
        pg_collection=SimpleNamespace(cp=None),
    ).train(case != "evaluation")
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    rotated, value = torch.zeros(4, 1, 2, 4), torch.zeros(4, 1, 2, 4, dtype=dtype)
    attention(rotated, rotated, value, None)
    if case in ("plain", "evaluation"):
        assert calls == [(dtype, dtype, (None, AttnMaskType.causal))]  # no longer in float32
    else:
        assert calls == ["local"]


def test_the_cross_entropy_of_transformer_engine_gets_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from steel_megatron.model.implementation import cross_entropy

    monkeypatch.setattr(
        transformer_engine, "te_parallel_cross_entropy", lambda logits, labels, tp_group: (logits, labels, tp_group)
    )
    group: Any = "the group"
    assert cross_entropy(LOCAL, group) is vocab_parallel_cross_entropy
    assert cross_entropy(Implementation("2.20.2"), group)(1, 2) == (1, 2, group)  # type: ignore[arg-type,comparison-overlap]
