"""The models that are compared: one small transformer with different feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steel_megatron.config import ModelConfig
from steel_megatron.model.flops import training_flops_per_token

EXPERTS = 6
INNER = 128
"""Inner width of the dense double SwiGLU, and of one expert by default."""
BASE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_experts": EXPERTS,
    "ffn_hidden_size": INNER,
    "vocab_size": 257,
    "make_vocab_size_divisible_by": 1,
    "sequence_length": 512,
    "rotary_base": 10_000,
    "init_method_std": 0.125,  # 1 / sqrt(hidden_size); the library's 0.02 is for wide models
}
LENGTHS = (16, 64, 256)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: short and fit for a file name.
        title: for people.
        group: the part of the table it belongs to.
        model: its settings.
    """

    name: str
    title: str
    group: str
    model: ModelConfig

    @property
    def flops(self) -> float:
        """Training FLOPs per token."""
        return training_flops_per_token(self.model)


def _model(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**BASE, **changes})


BUDGET = training_flops_per_token(_model(ffn="dense"))
"""Training FLOPs per token of the dense double SwiGLU, which variants "at equal FLOPs" do not go over."""
EQUAL = 0.98
"""Within this of the budget, FLOPs count as equal: widths are whole numbers."""


def _widest(build: Callable[[int], ModelConfig]) -> ModelConfig:
    """The model with the largest width that stays within the budget."""
    low, high = 1, 64 * INNER
    assert training_flops_per_token(build(low)) <= BUDGET < training_flops_per_token(build(high))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if training_flops_per_token(build(middle)) <= BUDGET else (low, middle)
    return build(low)


def _block_causal(block_length: int, shared: bool, **changes: Any) -> ModelConfig:
    """Experts of the dense network's width; a shared expert takes the FLOPs that are left."""
    settings = {"routing_mode": "block_causal", "block_length": block_length, **changes}
    if not shared:
        return _model(**settings)
    return _widest(lambda width: _model(**settings, shared_expert_intermediate_size=width))


def _at_equal_flops(**changes: Any) -> ModelConfig:
    """The width of the experts takes the whole budget."""
    return _widest(lambda width: _model(**{**changes, "ffn_hidden_size": width}))


def _baselines() -> list[Variant]:
    # SwiGLU has three matrices where double SwiGLU has four: 4/3 of its width has as many parameters.
    swiglu = {"ffn": "top_k_moe", "ffn_activation": "swiglu"}
    return [
        Variant("none", "no FFN", "baseline", _model(ffn="none")),
        Variant("dense-swiglu", "dense SwiGLU", "baseline", _at_equal_flops(ffn="dense", ffn_activation="swiglu")),
        Variant("dense-double", "dense double SwiGLU", "baseline", _model(ffn="dense")),
        # As wide as the shared expert of block_causal K=16: what the rest of that model adds.
        Variant(
            "dense-narrow", "dense double SwiGLU, inner width 71", "baseline", _model(ffn="dense", ffn_hidden_size=71)
        ),
        Variant(
            "top2-parameters",
            "top-2 of 6 experts (equal parameters)",
            "baseline",
            _model(**swiglu, ffn_hidden_size=INNER * 4 // 3),
        ),
        Variant(
            "top2-flops", "top-2 of 12 experts (equal FLOPs)", "baseline", _at_equal_flops(**swiglu, num_experts=12)
        ),
    ]


def _modes() -> list[Variant]:
    variants = []
    for mix in ("raw", "normalized"):
        model = _model(routing_mode="sequence", slot_input=mix)
        variants.append(Variant(f"sequence-{mix}", f"sequence, {mix}", "mode", model))
        for length in LENGTHS:
            for shared in (False, True):
                name = f"block{length}{'-shared' if shared else ''}-{mix}"
                title = f"block_causal K={length}{' + shared' if shared else ''}, {mix}"
                variants.append(Variant(name, title, "mode", _block_causal(length, shared, slot_input=mix)))
        model = _at_equal_flops(routing_mode="token", slot_input=mix)
        variants.append(Variant(f"token-{mix}", f"token, {mix}", "mode", model))
    for length in LENGTHS:
        model = _at_equal_flops(routing_mode="merged", block_length=length)
        variants.append(Variant(f"merged{length}", f"merged K={length}", "mode", model))
    return variants


def _sharper() -> list[Variant]:
    """Small changes that might help: sharper routing from the start, more slots, the other expert."""
    scale = {"routing_scale_init": 8.0}  # sqrt(hidden_size): logits of unlike tokens then differ by about 1
    four = {**scale, "slots_per_expert": 4}
    swiglu = {**scale, "ffn_activation": "swiglu", "ffn_hidden_size": INNER * 4 // 3}
    models = {
        "block16-shared-s8": ("block_causal K=16 + shared, scale 8", _block_causal(16, True, **scale)),
        "block64-shared-s8": ("block_causal K=64 + shared, scale 8", _block_causal(64, True, **scale)),
        "block16-shared-s8-p4": (
            "block_causal K=16 + shared, scale 8, 4 slots of a quarter's width",
            _block_causal(16, True, **four, ffn_hidden_size=INNER // 4),
        ),
        "block64-shared-s8-p4": ("block_causal K=64 + shared, scale 8, 4 slots", _block_causal(64, True, **four)),
        "block64-shared-s8-swiglu": ("block_causal K=64 + shared, scale 8, SwiGLU", _block_causal(64, True, **swiglu)),
        "token-s8": ("token, scale 8", _at_equal_flops(routing_mode="token", **scale)),
    }
    for length in LENGTHS:
        merged = _at_equal_flops(routing_mode="merged", block_length=length, **scale)
        models[f"merged{length}-s8"] = (f"merged K={length}, scale 8", merged)
    sharp = {"routing_scale_init": 32.0}
    many = _at_equal_flops(routing_mode="merged", block_length=256, num_experts=16, **scale)
    models |= {
        "block64-shared-s32": ("block_causal K=64 + shared, scale 32", _block_causal(64, True, **sharp)),
        "merged64-s32": ("merged K=64, scale 32", _at_equal_flops(routing_mode="merged", block_length=64, **sharp)),
        "merged256-s8-e16": ("merged K=256, scale 8, 16 experts", many),
    }
    merged = _at_equal_flops(routing_mode="merged", block_length=64, ffn_activation="swiglu", **scale)
    models["merged64-s8-swiglu"] = ("merged K=64, scale 8, SwiGLU", merged)
    return [Variant(name, title, "attempt", model) for name, (title, model) in models.items()]


def _larger_init() -> list[Variant]:
    """Larger initial experts: merged evenly, E experts are 1 / sqrt(E) of one, and a cubic expert then is nearly 0.

    Dense networks with larger initial weights are the control.
    """

    def times(factor: float) -> dict[str, float]:
        return {"expert_init_method_std": BASE["init_method_std"] * factor}

    even = times(EXPERTS**0.5)
    scale = {"routing_scale_init": 8.0}
    merged = {"routing_mode": "merged", **even}
    models = {
        "dense-double-i0.7": ("dense double SwiGLU, init x 0.7", _model(ffn="dense", **times(0.7))),
        "dense-double-i1.6": ("dense double SwiGLU, init x 1.6", _model(ffn="dense", **times(1.6))),
        "dense-double-i2.4": ("dense double SwiGLU, init x sqrt(6)", _model(ffn="dense", **even)),
        "merged64-i": ("merged K=64, init x sqrt(6)", _at_equal_flops(**merged, block_length=64)),
    }
    for length in LENGTHS:
        model = _at_equal_flops(**merged, **scale, block_length=length)
        models[f"merged{length}-s8-i"] = (f"merged K={length}, scale 8, init x sqrt(6)", model)
    many = {"routing_mode": "merged", "block_length": 256, "num_experts": 16, **scale, **times(4.0)}
    swiglu = {**merged, **scale, "block_length": 64, "ffn_activation": "swiglu"}
    # A narrow expert's result is small: 1.6 times the weights make the layer's about as large as the dense network's.
    token = {"routing_mode": "token", **times(1.6)}
    three = {**token, **times(1.3), "num_experts": 3}
    models |= {
        "merged256-s8-e16-i": ("merged K=256, scale 8, 16 experts, init x 4", _at_equal_flops(**many)),
        "merged64-s8-swiglu-i": ("merged K=64, scale 8, SwiGLU, init x sqrt(6)", _at_equal_flops(**swiglu)),
        "token-i1.6": ("token, init x 1.6", _at_equal_flops(**token)),
        "token-s8-i1.6": ("token, scale 8, init x 1.6", _at_equal_flops(**token, **scale)),
        "token-e3-i1.3": ("token, 3 experts, init x 1.3", _at_equal_flops(**three)),
        "block16-shared-i": ("block_causal K=16 + shared, init x sqrt(6)", _block_causal(16, True, **even)),
        "block64-shared-s8-i": (
            "block_causal K=64 + shared, scale 8, init x sqrt(6)",
            _block_causal(64, True, **scale, **even),
        ),
    }
    return [
        Variant(name, title, "baseline" if name.startswith("dense") else "attempt", model)
        for name, (title, model) in models.items()
    ]


def _alike() -> list[Variant]:
    """Experts that begin as copies of one: merged, they begin as a dense network, however they are weighted."""
    variants = []
    for length, scale, experts in ((64, 1, 6), (64, 8, 6), (64, 32, 6), (256, 8, 6), (256, 8, 16)):
        many = experts != EXPERTS
        name = f"merged{length}-s{scale}{f'-e{experts}' if many else ''}-alike"
        title = f"merged K={length}, scale {scale}{f', {experts} experts' if many else ''}, experts alike"
        settings = {"routing_scale_init": float(scale), "num_experts": experts, "identical_expert_init": True}
        model = _at_equal_flops(routing_mode="merged", block_length=length, **settings)
        variants.append(Variant(name, title, "attempt", model))
    return variants


def _swiglu() -> list[Variant]:
    """The best of each causal mode with SwiGLU experts, which trained for longer are the better dense network."""
    swiglu = {"ffn_activation": "swiglu", "ffn_hidden_size": INNER * 4 // 3}
    alike = {**swiglu, "routing_mode": "merged", "routing_scale_init": 8.0, "identical_expert_init": True}
    token = {**swiglu, "routing_mode": "token", "expert_init_method_std": BASE["init_method_std"] * 1.6}
    models = {
        "block16-shared-swiglu-raw": (
            "block_causal K=16 + shared, raw, SwiGLU",
            _block_causal(16, True, **swiglu),
        ),
        "block16-shared-swiglu-normalized": (
            "block_causal K=16 + shared, normalized, SwiGLU",
            _block_causal(16, True, **swiglu, slot_input="normalized"),
        ),
        "token-swiglu-i1.6": ("token, SwiGLU, init x 1.6", _at_equal_flops(**token)),
    }
    for length in (64, 256):
        model = _at_equal_flops(**alike, block_length=length)
        models[f"merged{length}-s8-swiglu-alike"] = (f"merged K={length}, scale 8, SwiGLU, experts alike", model)
    return [Variant(name, title, "attempt", model) for name, (title, model) in models.items()]


VARIANTS: list[Variant] = [*_baselines(), *_modes(), *_sharper(), *_larger_init(), *_alike(), *_swiglu()]
LONG = (
    "none",
    "dense-swiglu",
    "dense-double",
    "dense-narrow",
    "top2-flops",
    "block16-shared-normalized",
    "token-raw",
    "token-i1.6",
    "merged64-s8-alike",
    "merged256-s8-alike",
    "block16-shared-swiglu-raw",
    "block16-shared-swiglu-normalized",
    "token-swiglu-i1.6",
    "merged64-s8-swiglu-alike",
    "merged256-s8-swiglu-alike",
)
"""What is trained for longer: baselines, what did best in the short runs of each causal mode, and that with SwiGLU."""
QUICK = ("dense-double", "sequence-raw", "top2-flops")
