"""Quantised weights stand for the plain ones to within their steps, and slices of them for slices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import quantization
from model.modes import GROUP_SIZE, Mode, stored_bytes
from model.quantization import NF4_LEVELS, QuantizedWeight, below_each_other, fp8_values, quantize

MODES: tuple[Mode, ...] = ("int8", "int4", "nf4", "fp8")
# Relative error of normal weights, as the number of levels lets expect.
ERROR = {"int8": 0.009, "fp8": 0.03, "int4": 0.11, "nf4": 0.11}
BITS = {"int8": 8, "fp8": 8, "int4": 4, "nf4": 4}


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight_OI: torch.Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
    return weight_OI


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    assert a.packed_OP.dtype == b.packed_OP.dtype
    bits = [x.packed_OP.contiguous().view(torch.uint8) for x in (a, b)]
    return a.mode == b.mode and torch.equal(*bits) and torch.equal(a.scale_OG, b.scale_OG)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (7, 192), (40, 256)])
def test_quantised_weights_are_close(mode: Mode, rows: int, columns: int) -> None:
    weight_OI = random(rows, columns)
    weight = quantize(weight_OI, mode)
    assert (weight.out_features, weight.in_features) == (rows, columns)
    error_OI = weight.dequantize(torch.float32) - weight_OI
    assert float(error_OI.norm() / weight_OI.norm()) < ERROR[mode]
    scales = rows * columns // weight.group_size
    assert weight.nbytes == rows * columns * BITS[mode] // 8 + scales * weight.scale_OG.dtype.itemsize


@pytest.mark.parametrize("mode", MODES)
def test_precision_is_that_of_the_definition_rounded_once(mode: Mode) -> None:
    weight = quantize(random(9, 128), mode)
    assert torch.equal(weight.dequantize(torch.bfloat16), weight.dequantize(torch.float32).bfloat16())


@pytest.mark.parametrize("mode", MODES)
def test_weights_on_levels_are_kept_exactly(mode: Mode) -> None:
    """A matrix that has been quantised does not change when it is quantised again."""
    once = quantize(random(5, 128), mode).dequantize(torch.float32)
    assert torch.equal(quantize(once, mode).dequantize(torch.float32), once)


@pytest.mark.parametrize("mode", MODES)
def test_its_size_is_known_before_it_is_made(mode: Mode) -> None:
    assert quantize(random(10, 256), mode).nbytes == stored_bytes(mode, 10, 256)


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros(mode: Mode) -> None:
    weight_OI = torch.zeros(3, 128)
    weight_OI[1, 70] = 2.0
    found_OI = quantize(weight_OI, mode).dequantize(torch.float32)
    assert torch.equal(found_OI == 0, weight_OI == 0)
    assert found_OI[1, 70] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_quantise_then_slice_is_a_slice_of_the_whole(mode: Mode) -> None:
    whole = quantize(random(12, 256), mode)
    expected_OI = whole.dequantize(torch.float32)
    rows = [whole.rows(slice(first, first + 4)) for first in range(0, 12, 4)]
    assert same(below_each_other(rows, 12), whole)
    for parts in (2, 4):
        width = 256 // parts
        cut = [whole.columns(range(part * width, (part + 1) * width)) for part in range(parts)]
        assert torch.equal(torch.cat([part.dequantize(torch.float32) for part in cut], dim=1), expected_OI)


@pytest.mark.parametrize("mode", MODES)
def test_pieces_of_memory_make_no_difference(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = random(11, 128)
    whole = quantize(weight_OI, mode)
    monkeypatch.setattr(quantization, "CPU_CHUNK", 400)
    assert same(quantize(weight_OI, mode), whole)


class Divisors(TorchDispatchMode):
    """Numbers of the host that something on another device is divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.div.Tensor and getattr(args[1], "device", None) != args[0].device:
            self.found.append(float(args[1]))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_a_device_divides_as_the_host_does(mode: Mode) -> None:
    """By a number of the host's it multiplies with the reciprocal, which is the same for powers of two alone."""
    with Divisors() as divisors:
        quantize(torch.empty(4, 128, device="meta"), mode)
    assert all(math.frexp(abs(number))[0] == 0.5 for number in divisors.found)


@pytest.mark.parametrize("mode", ["int4", "nf4"])
def test_two_weights_lie_in_a_byte_the_even_column_low(mode: Mode) -> None:
    weight = quantize(random(2, 64), mode)
    low, high = int(weight.packed_OP[1, 3]) & 15, int(weight.packed_OP[1, 3]) >> 4
    scale = float(weight.scale_OG[1, 0])
    for column, code in ((6, low), (7, high)):
        level = code - 8 if mode == "int4" else NF4_LEVELS[code]
        assert float(weight.dequantize(torch.float32)[1, column]) == pytest.approx(level * scale, rel=1e-6)


def test_nf4_takes_the_nearest_level() -> None:
    weight_OI = random(4, GROUP_SIZE)
    levels = torch.tensor(NF4_LEVELS) * weight_OI.abs().amax(1, keepdim=True)
    nearest_OI = levels.gather(1, (weight_OI[..., None] - levels[:, None]).abs().argmin(-1))
    torch.testing.assert_close(quantize(weight_OI, "nf4").dequantize(torch.float32), nearest_OI)


def test_every_byte_of_fp8_is_what_torch_says() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = ~every.float().isnan()
    assert torch.equal(fp8_values(every)[numbers], every.float()[numbers])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_number_is_found(mode: Mode) -> None:
    weight_OI = random(4, 64)
    assert quantize(weight_OI, mode).is_finite()
    weight_OI[2, 5] = torch.inf
    assert not quantize(weight_OI, mode).is_finite()
    weight_OI[2, 5] = torch.nan
    assert not quantize(weight_OI, mode).is_finite()
