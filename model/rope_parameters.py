"""What a config says about rotary position embedding, whichever way it spells it. What it means: rotary.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

from model.fields import Fields

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """One dictionary of Hugging Face's, whichever way it was spelled. Fields that a type does not use stay unset."""

    rope_type: RopeType = "default"
    rope_theta: float = 1_000_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 4096 * 32
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rope(outer: Fields, max_position_embeddings: int, head_dim: int) -> RopeParameters:
    """rope_theta beside rope_scaling (before transformers 5), or all of it in rope_parameters."""
    scaling, parameters = outer.table("rope_scaling"), outer.table("rope_parameters")
    theta = outer.number("rope_theta", 1_000_000.0, above=1.0)
    original = outer.optional_integer("original_max_position_embeddings", low=2, high=1 << 27)
    outer.only("partial_rotary_factor", 1.0)
    fields = outer.nested("rope_scaling" if scaling else "rope_parameters", scaling or parameters)
    kind = fields.choice("rope_type", None, ROPE_TYPES) or fields.choice("type", "default", ROPE_TYPES)
    fields.raw("type")
    fields.only("partial_rotary_factor", 1.0)
    theta = fields.number("rope_theta", theta, above=1.0)
    original = fields.optional_integer("original_max_position_embeddings", low=2, high=1 << 27) or original
    original = original or max_position_embeddings
    rope = RopeParameters(cast(RopeType, kind), theta, original_max_position_embeddings=original)
    match rope.rope_type:
        case "default":
            pass
        case "linear" | "dynamic":
            rope = replace(rope, factor=fields.number("factor", None))
        case "yarn":
            rope = replace(
                rope,
                factor=fields.number("factor", None),
                attention_factor=fields.optional_number("attention_factor"),
                beta_fast=fields.number("beta_fast", 32.0),
                beta_slow=fields.number("beta_slow", 1.0),
                mscale=fields.optional_number("mscale"),
                mscale_all_dim=fields.optional_number("mscale_all_dim"),
                truncate=fields.boolean("truncate", True),
            )
        case "llama3":
            rope = replace(
                rope,
                factor=fields.number("factor", None),
                low_freq_factor=fields.number("low_freq_factor", None),
                high_freq_factor=fields.number("high_freq_factor", None),
            )
            if rope.high_freq_factor <= rope.low_freq_factor:
                fields.refuse("high_freq_factor", f"must be above low_freq_factor, {rope.low_freq_factor:g}")
        case "longrope":
            rope = replace(
                rope,
                factor=fields.number("factor", max_position_embeddings / original),
                attention_factor=fields.optional_number("attention_factor"),
                short_factor=fields.numbers("short_factor", length=head_dim // 2),
                long_factor=fields.numbers("long_factor", length=head_dim // 2),
            )
    if left := fields.left_over():
        fields.refuse(left[0], f"does not belong to rope_type {rope.rope_type}")
    return rope
