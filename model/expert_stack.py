"""The experts of a block as one piece of memory per product, which kernels for all of them together want.

E: experts.  O, I: features out and in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.layers import Linear, PlainLinear
from model.quantization import QuantizedWeight
from model.quantized_linear import Fp8Linear, QuantizedLinear
from model.weights import MixtralWeights

if TYPE_CHECKING:
    from model.kernels.weight_tiles import WeightStack


def stack_linears(linears: Sequence[Linear]) -> WeightStack:
    """Afterwards each linear map looks at its part of the stack, so that no weight is kept twice.

    What is copied beside what there was is one stack at most, and nothing where the parts lie together already.
    """
    from model.kernels.weight_tiles import WeightStack

    quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear | Fp8Linear)]
    if not quantized:
        weight_EOI = together([linear.weight_OI for linear in linears])
        for linear, weight_OI in zip(linears, weight_EOI, strict=True):
            if isinstance(linear, PlainLinear):
                linear.weight_OI = weight_OI
        return WeightStack.plain(weight_EOI)
    assert len(quantized) == len(linears)
    mode = quantized[0].weight.mode
    packed_EOP = together([linear.weight.packed_OP for linear in quantized])
    scale_EOG = together([linear.weight.scale_OG for linear in quantized])
    for quantized_linear, packed_OP, scale_OG in zip(quantized, packed_EOP, scale_EOG, strict=True):
        quantized_linear.weight = QuantizedWeight(mode, packed_OP, scale_OG)
    return WeightStack.quantized(mode, packed_EOP, scale_EOG)


def together(parts: Sequence[Tensor]) -> Tensor:
    """The parts below each other: as they lie where they lie so, else copied."""
    first = parts[0]
    adjacent = all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + index * first.numel()
        for index, part in enumerate(parts)
    )
    if not adjacent:
        return torch.stack(list(parts))
    return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))


def put_together(weights: MixtralWeights) -> None:
    """Every block's experts, while there is room: what this frees is free before pages are given what is left."""
    for block in weights.blocks:
        stack_linears([expert.gate_up for expert in block.experts])
        stack_linears([expert.down for expert in block.experts])
