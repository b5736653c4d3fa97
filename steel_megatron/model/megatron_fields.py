"""Fields of megatron-core's own configs that the library has no setting for (``model.megatron``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from steel_megatron.config import FeedForward, ModelConfig
from steel_megatron.config.loading import described, is_a
from steel_megatron.config.megatron import (
    COMPUTATION_FIELDS,
    EXECUTION_FIELDS,
    LOSS_SCALE_FIELDS,
    REQUIRES,
    TOP_K_MOE_FIELDS,
    changes_the_result,
)
from steel_megatron.errors import ConfigError

Config = TypeVar("Config")


def with_further_fields(
    kind: type[Config], own: Mapping[str, Any], further: Mapping[str, Any], option: str, allowed: Collection[str]
) -> Config:
    """Build one of megatron-core's configs from the library's settings and a user's further fields.

    Args:
        kind: the dataclass of megatron-core.
        own: fields that the library sets, by name.
        further: fields that the user adds.
        option: the option they came from, for the message.
        allowed: fields that the user may set.

    Raises:
        ConfigError: a field may not be set, would have no effect, has a value of another type, or megatron-core
            refuses it.
    """
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for name, value in further.items():
        given = f"{option}.{name} = {value!r}"
        if name in own:
            raise ConfigError(f"{given}: the library sets this field itself, to {own[name]!r}; use its own option")
        if name not in allowed:
            raise ConfigError(f"{given}: {_reason(name, kind, known)}; {option} takes {', '.join(allowed)}")
        if _is_plain(hints[name]) and value != known[name].default and not is_a(value, hints[name]):
            raise ConfigError(f"{given}; it must be {described(hints[name])}")
        if value not in (known[name].default, None):
            _check_requirement(name, further, option)
    try:
        return kind(**own, **further)
    except (TypeError, ValueError, AssertionError) as error:
        if not further:
            raise
        given = ", ".join(f"{name} = {value!r}" for name, value in further.items())
        raise ConfigError(f"megatron-core refuses {option} with {given}: {error}") from error


def model_fields(ffn: FeedForward) -> tuple[str, ...]:
    """The fields of TransformerConfig that models with this feed-forward layer read."""
    return EXECUTION_FIELDS + COMPUTATION_FIELDS + (TOP_K_MOE_FIELDS if ffn == "top_k_moe" else ())


def check_recompute_modules(ffn: FeedForward, further: Mapping[str, Any]) -> None:
    """Refuse parts of a layer that the library's models do not have, or that cannot be recomputed.

    Args:
        ffn: the model's feed-forward layer.
        further: the fields of ``model.megatron``.

    Raises:
        ConfigError: ``recompute_modules`` names another part.
    """
    possible = ("core_attn", *({"none": (), "top_k_moe": ("moe",)}.get(ffn, ("mlp",))))
    for name in further.get("recompute_modules") or ():
        if name not in possible:
            raise ConfigError(
                f"model.megatron.recompute_modules has {name!r}; with ffn = {ffn} it takes {', '.join(possible)}"
            )


def without_ineffective_fields(model: ModelConfig) -> ModelConfig:
    """Settings of a checkpoint to compute with it on any machine, whatever computed it in training.

    Without megatron-core fields that earlier versions accepted and nothing read.
    """
    allowed = model_fields(model.ffn)
    kept = {name: value for name, value in model.megatron.items() if name in allowed or changes_the_result(name)}
    return dataclasses.replace(model, megatron=kept, implementation="local")


def _reason(name: str, kind: type, known: Collection[str]) -> str:
    if name not in known or name.startswith("_"):
        return f"{kind.__name__} has no such field"
    if name in TOP_K_MOE_FIELDS:
        return "only models with ffn = top_k_moe read this field"
    if name in LOSS_SCALE_FIELDS:
        return "only runs with training.precision = float16 read this field"
    return "the library's modules do not read this field or do not work with it"


def _check_requirement(name: str, further: Mapping[str, Any], option: str) -> None:
    other, wanted = REQUIRES.get(name, (None, None))
    if other is None or (further.get(other) is not None and wanted in (None, further[other])):
        return
    must = f"{option}.{other}" + ("" if wanted is None else f" = {wanted}")
    raise ConfigError(f"{option}.{name} = {further[name]!r} has no effect without {must}")


def _is_plain(hint: Any) -> bool:
    """Whether a field's type is one that YAML has; the others are megatron-core's to check."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType, list):
        return all(map(_is_plain, parts))
    return kind is Literal or hint in (bool, int, float, str, NoneType)
