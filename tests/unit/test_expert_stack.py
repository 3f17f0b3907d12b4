"""Experts put together: what kernels read, that linear maps go on looking at it, and that nothing is kept twice."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from model.config import MixtralConfig
from model.expert_stack import put_together, stack_linears, together
from model.layers import PlainLinear, make_linear
from model.modes import Mode
from model.quantization import quantize
from model.quantized_linear import QuantizedLinear
from tests.random_model import RandomModel
from tests.tiny import CONFIG

pytest.importorskip("triton", reason="stacks are what kernels read")

WEIGHTS = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(0))


def test_linear_maps_look_at_their_part() -> None:
    linears = [PlainLinear(weight_OI.clone()) for weight_OI in WEIGHTS]
    stack = stack_linears(linears)
    assert torch.equal(stack.packed_EOP, WEIGHTS)
    for linear, part in zip(linears, stack.packed_EOP, strict=True):
        assert linear.weight_OI.data_ptr() == part.data_ptr()
    assert (stack.mode, stack.out_features, stack.in_features) == ("plain", 10, 64)
    assert stack_linears(linears).packed_EOP.data_ptr() == stack.packed_EOP.data_ptr()  # nothing is copied again


def test_what_is_packed_for_a_cpu_is_copied() -> None:
    linears = [make_linear(weight_OI.clone()) for weight_OI in WEIGHTS]
    assert torch.equal(stack_linears(linears).packed_EOP, WEIGHTS)
    assert torch.equal(linears[1].weight_OI, WEIGHTS[1])


@pytest.mark.parametrize("mode", get_args(Mode))
def test_quantised_weights_keep_their_meaning(mode: Mode) -> None:
    weights = [quantize(weight_OI, mode) for weight_OI in WEIGHTS]
    expected = [weight.dequantize(torch.float32) for weight in weights]
    linears = [QuantizedLinear(weight, torch.float32) for weight in weights]
    stack = stack_linears(linears)
    assert (stack.mode, stack.out_features, stack.in_features) == (mode, 10, 64)
    assert stack.group_size == weights[0].group_size
    for linear, weight_OI, part in zip(linears, expected, stack.packed_EOP, strict=True):
        assert torch.equal(linear.weight_OI, weight_OI)
        assert linear.weight.packed_OP.data_ptr() == part.data_ptr()


def test_parts_that_lie_together_stay_where_they_are() -> None:
    assert together(list(WEIGHTS)).data_ptr() == WEIGHTS.data_ptr()
    for scattered in ([WEIGHTS[0], WEIGHTS[2]], [WEIGHTS[1], WEIGHTS[0]], [WEIGHTS[0], WEIGHTS[1].clone()]):
        found = together(scattered)
        assert torch.equal(found, torch.stack(scattered))
        assert found.data_ptr() != WEIGHTS.data_ptr()


def test_all_blocks_are_put_together() -> None:
    weights = RandomModel(MixtralConfig.from_dict(CONFIG, "config.json"), torch.device("cpu"), torch.float32).weights()
    linears = [[getattr(e, name) for e in block.experts] for block in weights.blocks for name in ("gate_up", "down")]
    for linear in (linear for stack in linears for linear in stack):
        linear.weight_OI = linear.weight_OI.clone()
    put_together(weights)
    for stack in linears:
        parts = [linear.weight_OI for linear in stack]
        assert together(parts).data_ptr() == parts[0].data_ptr()
