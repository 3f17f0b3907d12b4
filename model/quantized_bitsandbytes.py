"""Quantised matrices as bitsandbytes saves them: nf4, each 64 weights with a scale, the scales quantised or not.

    X.weight                                U8 [O * I / 2, 1]    two codes a byte, the even column in the high half
    X.weight.absmax                         F32 [B], or U8 [B] where scales are quantised
    X.weight.quant_map                      F32 [16]             the levels
    X.weight.nested_absmax                  F32 [B / 256]        of quantised scales: 256 of them share a scale,
    X.weight.nested_quant_map               F32 [256]            each byte stands for a level,
    X.weight.quant_state.bitsandbytes__nf4  U8 [...]             and JSON holds what is added to all, and the shape

    scale = nested_quant_map[absmax[b]] * nested_absmax[b // 256] + nested_offset

O, I: features out and in.  B: blocks of 64 weights, row after row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.fields import Fields, is_number, shown
from model.modes import GROUP_SIZE, Mode
from model.quantization import NF4_LEVELS, QuantizedWeight
from model.quantized_files import Expected, Slice, divided
from model.tensor_files import TensorInfo

STATE = "quant_state.bitsandbytes__nf4"
NESTED_BLOCK = 256
BYTES = (torch.uint8,)
FLOAT = (torch.float32,)


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    nested: bool  # "double quantisation": the scales are quantised too

    @property
    def mode(self) -> Mode:
        return "nf4"

    @property
    def alignment(self) -> int:
        return GROUP_SIZE

    def holds(self, name: str, infos: Mapping[str, TensorInfo]) -> bool:
        return f"{name}.{STATE}" in infos

    def tensors(self, name: str, shape: tuple[int, int]) -> dict[str, Expected]:
        weights = shape[0] * shape[1]
        blocks = weights // GROUP_SIZE
        expected = {
            name: Expected((weights // 2, 1), BYTES),
            f"{name}.absmax": Expected((blocks,), BYTES if self.nested else FLOAT),
            f"{name}.quant_map": Expected((16,), FLOAT),
        }
        if self.nested:
            expected[f"{name}.nested_absmax"] = Expected((-(-blocks // NESTED_BLOCK),), FLOAT)
            expected[f"{name}.nested_quant_map"] = Expected((256,), FLOAT)
        return expected | {f"{name}.{STATE}": Expected(None, BYTES)}

    def slices(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> list[Slice]:
        blocks = divided(columns, GROUP_SIZE)
        found = [
            Slice(name, rows, divided(columns, 2), shape[1] // 2),
            Slice(f"{name}.absmax", rows, blocks, shape[1] // GROUP_SIZE),
            Slice(f"{name}.quant_map"),
            Slice(f"{name}.{STATE}"),
        ]
        if self.nested:
            found += [Slice(f"{name}.nested_absmax"), Slice(f"{name}.nested_quant_map")]
        return found

    def assemble(
        self, name: str, shape: tuple[int, int], rows: range, columns: range, parts: list[Tensor]
    ) -> QuantizedWeight:
        packed, absmax, levels, state, *nested = parts
        offset = read_state(name, shape, bytes(state.flatten().tolist()), nested=self.nested)
        if not torch.allclose(levels.flatten(), torch.tensor(NF4_LEVELS), atol=1e-6):
            raise CheckpointError(f"{name}.quant_map holds other levels than nf4's")
        if self.nested:
            nested_absmax, nested_levels = (part.flatten() for part in nested)
            row = torch.tensor(rows)[:, None] * (shape[1] // GROUP_SIZE)
            block = row + torch.tensor(divided(columns, GROUP_SIZE))
            absmax = nested_levels[absmax.int()] * nested_absmax[block // NESTED_BLOCK] + offset
        return QuantizedWeight("nf4", packed << 4 | packed >> 4, absmax)

    def store(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        assert not self.nested
        packed = weight.packed_OP
        state = {
            "quant_type": "nf4",
            "blocksize": GROUP_SIZE,
            "dtype": "bfloat16",
            "shape": [weight.out_features, weight.in_features],
        }
        text = json.dumps(state).encode()
        text += b" " * (-len(text) % 8)  # what follows in the file stays aligned
        return {
            name: (packed << 4 | packed >> 4).view(-1, 1),
            f"{name}.absmax": weight.scale_OG.flatten(),
            f"{name}.quant_map": torch.tensor(NF4_LEVELS),
            f"{name}.{STATE}": torch.tensor(list(text), dtype=torch.uint8),
        }

    def config(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": ["lm_head", "gate"],
        }


def read_state(name: str, shape: tuple[int, int], text: bytes, *, nested: bool) -> float:
    """What is added to all scales; the rest of what a matrix says of itself must be what was expected."""
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{name}.{STATE} is not a JSON object")
    expected: dict[str, object] = {"quant_type": "nf4", "blocksize": GROUP_SIZE, "shape": list(shape)}
    if nested:
        expected["nested_blocksize"] = NESTED_BLOCK
    for field, value in expected.items():
        if state.get(field) != value:
            raise CheckpointError(f"{name} has {field} {shown(state.get(field))}; served is {shown(value)}")
    offset = state.get("nested_offset", 0.0)
    if not is_number(offset):
        raise CheckpointError(f"{name} has nested_offset {shown(offset)}, which is no number")
    return float(offset)


def read_bitsandbytes(config: Fields) -> BitsAndBytes:
    """From config.json's quantization_config; what cannot be served is refused by name."""
    if not config.boolean("load_in_4bit", False) or config.boolean("load_in_8bit", False):
        config.refuse("load_in_4bit", "must be true: of bitsandbytes only nf4 is served")
    config.only("bnb_4bit_quant_type", "nf4")
    config.only("bnb_4bit_quant_storage", "uint8")
    return BitsAndBytes(config.boolean("bnb_4bit_use_double_quant", False))
