"""Quantised matrices as the compressed-tensors format has them: int4 and int8 packed, fp8 as it is.

    pack-quantized    X.weight_packed  I32 [O, I * bits / 32]   codes plus 2^(bits - 1), the first column lowest
                      X.weight_scale   [O, G], or [O, 1] where a row has one scale
                      X.weight_shape   I64 [2]
    float-quantized   X.weight         F8_E4M3 [O, I]
                      X.weight_scale   [O, 1], or [1] where the matrix has one scale

On little-endian machines the packed words of int4 are our bytes, and those of int8 are ours with the sign turned.
Rounding of activations is not a property of the weights: fp8 files that ask for it get it where the device has fp8.

O, I: features out and in.  G: groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.fields import Fields
from model.modes import Mode
from model.quantization import QuantizedWeight
from model.quantized_files import Expected, Slice, divided
from model.tensor_files import FLOATS, TensorInfo

IGNORED = ("lm_head", "re:.*block_sparse_moe.gate$")  # what is kept plain, as this format's config spells it
MAX_GROUP = 1 << 16


@dataclass(frozen=True, slots=True)
class PackQuantized:
    bits: int  # 4 or 8
    group: int | None  # columns that share a scale; None: all of a row

    @property
    def mode(self) -> Mode:
        return "int4" if self.bits == 4 else "int8"

    @property
    def alignment(self) -> int:
        per_word = 32 // self.bits
        return per_word if self.group is None else max(per_word, self.group)

    def holds(self, name: str, infos: Mapping[str, TensorInfo]) -> bool:
        return f"{name}_packed" in infos

    def tensors(self, name: str, shape: tuple[int, int]) -> dict[str, Expected]:
        height, width = shape
        return {
            f"{name}_packed": Expected((height, width * self.bits // 32), (torch.int32,)),
            f"{name}_scale": Expected((height, width // (self.group or width)), FLOATS),
            f"{name}_shape": Expected((2,), (torch.int64,)),
        }

    def slices(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> list[Slice]:
        groups = None if self.group is None else divided(columns, self.group)
        return [
            Slice(f"{name}_packed", rows, divided(columns, 32 // self.bits)),
            Slice(f"{name}_scale", rows, groups),
        ]

    def assemble(
        self, name: str, shape: tuple[int, int], rows: range, columns: range, parts: list[Tensor]
    ) -> QuantizedWeight:
        words, scales = parts
        codes = words.view(torch.uint8)
        return QuantizedWeight(self.mode, codes if self.bits == 4 else (codes ^ 0x80).view(torch.int8), scales)

    def store(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        codes = weight.packed_OP if self.bits == 4 else weight.packed_OP.view(torch.uint8) ^ 0x80
        shape = torch.tensor([weight.out_features, weight.in_features])
        return {
            f"{name}_packed": codes.view(torch.int32),
            f"{name}_scale": weight.scale_OG,
            f"{name}_shape": shape,
        }

    def config(self) -> dict[str, Any]:
        return config_of("pack-quantized", scheme("int", self.bits, self.group), None)


@dataclass(frozen=True, slots=True)
class FloatQuantized:
    one_scale: bool = False  # for a whole matrix, not for each of its rows

    @property
    def mode(self) -> Mode:
        return "fp8"

    @property
    def alignment(self) -> int:
        return 1

    def holds(self, name: str, infos: Mapping[str, TensorInfo]) -> bool:
        return name in infos and infos[name].dtype == torch.float8_e4m3fn

    def tensors(self, name: str, shape: tuple[int, int]) -> dict[str, Expected]:
        return {
            name: Expected(shape, (torch.float8_e4m3fn,)),
            f"{name}_scale": Expected((1,) if self.one_scale else (shape[0], 1), FLOATS),
        }

    def slices(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> list[Slice]:
        return [Slice(name, rows, columns), Slice(f"{name}_scale", None if self.one_scale else rows)]

    def assemble(
        self, name: str, shape: tuple[int, int], rows: range, columns: range, parts: list[Tensor]
    ) -> QuantizedWeight:
        codes, scales = parts
        return QuantizedWeight("fp8", codes, scales.expand(len(rows), 1).contiguous())

    def store(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {name: weight.packed_OP, f"{name}_scale": weight.scale_OG}

    def config(self) -> dict[str, Any]:
        activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        return config_of("float-quantized", scheme("float", 8, None), activations)


def scheme(kind: str, bits: int, group: int | None) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False} | strategy


def config_of(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": list(IGNORED),
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def read_compressed_tensors(config: Fields) -> PackQuantized | FloatQuantized:
    """From config.json's quantization_config; what cannot be served is refused by name."""
    layout = config.choice("format", None, ("pack-quantized", "float-quantized", "naive-quantized"))
    config.only("quantization_status", "compressed")
    config.only("kv_cache_scheme", None)
    config.only("transform_config", {})
    config.only("sparsity_config", {}, {"format": "dense"})
    groups = config.table("config_groups")
    if len(groups) != 1:
        config.refuse("config_groups", f"has {len(groups)} groups; served are checkpoints with one for all matrices")
    [(name, table)] = groups.items()
    group = config.nested(f"config_groups.{name}", table if isinstance(table, dict) else {})
    group.only("output_activations", None)
    weights = group.nested("weights", group.table("weights"))
    if not group.table("weights"):
        group.refuse("weights", "is missing")
    weights.only("symmetric", True)
    weights.only("dynamic", False)
    weights.only("block_structure", None)
    weights.only("actorder", False, "weight", "static")  # others keep an order of columns beside the weights
    if layout == "pack-quantized":
        group.only("input_activations", None)
        weights.only("type", "int")
        return read_packed(weights)
    weights.only("type", "float")
    weights.only("num_bits", 8)
    activations = group.nested("input_activations", group.table("input_activations"))
    activations.only("dynamic", True)
    activations.only("type", "float")
    activations.only("num_bits", 8)
    return FloatQuantized(weights.choice("strategy", "tensor", ("tensor", "channel")) == "tensor")


def read_packed(weights: Fields) -> PackQuantized:
    bits = weights.integer("num_bits", 8, high=16)
    size = weights.optional_integer("group_size", low=-1, high=MAX_GROUP)
    if bits == 8:
        weights.only("strategy", "channel")
        return PackQuantized(8, None)
    weights.only("num_bits", 4)
    if weights.choice("strategy", "channel" if size in (None, -1) else "group", ("channel", "group")) == "channel":
        return PackQuantized(4, None)
    if size is None or size < 8 or size % 8:
        weights.refuse("group_size", f"must be a multiple of 8, not {size}")
    return PackQuantized(4, size)
