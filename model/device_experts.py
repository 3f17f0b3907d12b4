"""The experts of a block on a device: our kernels where reading weights is all, torch's grouped products where
multiplying is.

    few rows           grouped_experts            any weights, any device
    many rows, plain   torch's grouped product    Hopper and the Blackwell of data centres, bfloat16
    many rows, fp8     torch's scaled one         Hopper: rows are rounded to fp8 as well

S: tokens.  K: experts per token.  P: token-expert pairs, S * K.  N: rows for this rank's slots.  L: slots.
D: model width.  F: ffn width.  I, O: features in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from model.device_exchange import Listed
from model.exchange import Dispatched
from model.expert_stack import stack_linears
from model.to_device import numbers
from model.weights import ExpertWeights

if TYPE_CHECKING:
    from model.kernels.weight_tiles import WeightStack

# From so many rows per expert on, torch's grouped products take over on Hopper: multiplying is all there.
GROUPED_ROWS = 64

# Rows slot after slot, (P, I), and where each slot's end, int32 -> (P, O).
GroupedProduct = Callable[[Tensor, Tensor], Tensor]


class DeviceExperts:
    def __init__(self, experts: Sequence[ExpertWeights], dtype: torch.dtype) -> None:
        """`dtype`: of the rows."""
        self._stacks = [
            stack_linears([each.gate_up for each in experts]),
            stack_linears([each.down for each in experts]),
        ]
        self._products = [product for stack in self._stacks if (product := grouped_product_for(stack, dtype))]

    def __call__(self, dispatched: Dispatched) -> Tensor:
        if isinstance(dispatched, Listed):
            return self._listed(dispatched)
        # Rows that moved are a list as well: of one expert each, in the order they lie in, weighed by who sent them.
        x_ND, device = dispatched.x_ND, dispatched.x_ND.device
        order_N = torch.arange(len(x_ND), dtype=torch.int32, device=device)
        first_L = numbers([*accumulate(dispatched.rows, initial=0)], torch.int32, device)
        weight_N1 = torch.ones(len(x_ND), 1, device=device)
        listed = Listed(x_ND.contiguous(), [], order_N, weight_N1, first_L=first_L)
        return self._listed(listed)[:, 0].to(x_ND.dtype)

    def _listed(self, listed: Listed) -> Tensor:
        from model.kernels.grouped_experts import grouped_experts

        pairs, slots = listed.weight_SK.numel(), len(listed.first_L) - 1
        if len(self._products) == 2 and listed.share == 1 and pairs >= GROUPED_ROWS * slots:
            return grouped_products(listed, *self._products)
        gate_up, down = self._stacks
        return grouped_experts(
            listed.x_ND, listed.order_N, listed.first_L, listed.weight_SK, gate_up, down, listed.share
        )


def grouped_products(listed: Listed, gate_up: GroupedProduct, down: GroupedProduct) -> Tensor:
    """What grouped_experts gives, (S, K, D), float32, for many rows. Every pair must have its slot here.

    Padding has none: what is left in its places is anything, and nobody reads it but padding.
    """
    from model.kernels.swiglu import swiglu

    S, K = listed.weight_SK.shape
    ends_L = listed.first_L[1:]
    x_PD = listed.x_ND.index_select(0, listed.order_N // K)
    y_PD = down(swiglu(gate_up(x_PD, ends_L)), ends_L)
    weight_P1 = listed.weight_SK.flatten().index_select(0, listed.order_N)[:, None]
    out_PD = torch.empty(y_PD.shape, dtype=torch.float32, device=y_PD.device)
    return out_PD.index_copy_(0, listed.order_N.long(), y_PD * weight_P1).view(S, K, -1)


def grouped_product_for(stack: WeightStack, dtype: torch.dtype) -> GroupedProduct | None:
    """torch's, where tensor cores have one for such weights."""
    if stack.packed_EOP.device.type != "cuda" or dtype != torch.bfloat16:
        return None
    capability = torch.cuda.get_device_capability(stack.packed_EOP.device)
    # On other devices torch computes one group after another, and asks them how many rows each has.
    if stack.mode == "plain" and capability[0] in (9, 10) and fits_plain_product(stack):
        return partial(plain_product, stack.packed_EOP.transpose(1, 2))
    if stack.mode == "fp8" and capability == (9, 0) and fits_scaled_product(stack):
        return ScaledProduct(stack)
    return None


def plain_product(weight_LIO: Tensor, x_PI: Tensor, ends_L: Tensor) -> Tensor:
    return functional.grouped_mm(x_PI, weight_LIO, offs=ends_L)


def fits_plain_product(stack: WeightStack) -> bool:
    """Rows of 16 bytes or a multiple: a third of an expert, say, may have others."""
    return (
        stack.in_features * stack.packed_EOP.element_size() % 16 == 0
        and stack.out_features * stack.packed_EOP.element_size() % 16 == 0
    )


def fits_scaled_product(stack: WeightStack) -> bool:
    in_pieces = stack.in_features % 16 == 0 and stack.out_features % 16 == 0
    return in_pieces and stack.group_size == stack.in_features


class ScaledProduct:
    """Of fp8 with fp8: each row of x and each row of a weight has a scale."""

    def __init__(self, stack: WeightStack) -> None:
        self._code_LIO = stack.packed_EOP.view(torch.float8_e4m3fn).transpose(1, 2)
        self._scale_LO = stack.scale_EOG[..., 0].float().contiguous()

    def __call__(self, x_PI: Tensor, ends_L: Tensor) -> Tensor:
        from model.kernels.round_rows import round_rows

        code_PI, scale_P = round_rows(x_PI)
        return torch._scaled_grouped_mm(
            code_PI, self._code_LIO, scale_P, self._scale_LO, offs=ends_L, out_dtype=torch.bfloat16
        )
