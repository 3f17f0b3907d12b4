"""How kernels share out what they do: large enough that the last tasks go to whoever is free. All are done, each once,
whoever does them, and come out as they do one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.native.attention import Rows, attend
from model.native.library import has_kernels
from model.native.linear import NativeExperts, NativeLinear

pytestmark = pytest.mark.skipif(
    not has_kernels(), reason="no C compiler at installation, or no AVX-512 with BF16 in this processor"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def in_parts(compute: Callable[[Tensor], Tensor], x_TI: Tensor) -> Tensor:
    """Of so few rows each that their shares are fixed beforehand."""
    return torch.cat([compute(part) for part in torch.split(x_TI, 12)])


def test_a_linear_map_of_many_rows(threads: int) -> None:
    linear, x_TI = NativeLinear(random(2048, 6)), random(330, 6, seed=threads)
    assert torch.equal(linear(x_TI), in_parts(linear, x_TI))


@pytest.mark.parametrize("rows", [[700, 0, 13], [1, 350, 350]])
def test_experts_of_many_rows(threads: int, rows: list[int]) -> None:
    D, F = 608, 288
    gate_up = [NativeLinear(random(2 * F, D, seed=slot)) for slot in range(3)]
    down = [NativeLinear(random(D, F, seed=slot)) for slot in range(3)]
    x_ND = random(sum(rows), D, seed=threads)
    alone = [NativeExperts([g], [d]) for g, d in zip(gate_up, down, strict=True)]
    parts = [
        in_parts(lambda part, expert=expert: expert(part, [len(part)]), x_TD)  # type: ignore[misc]
        for expert, x_TD in zip(alone, torch.split(x_ND, rows), strict=True)
        if len(x_TD)
    ]
    assert torch.equal(NativeExperts(gate_up, down)(x_ND, rows), torch.cat(parts))


def test_rows_that_attend_to_long_contexts(threads: int) -> None:
    H, G, C = 4, 2, 32
    memory = random(1200, G, C), random(1200, G, C, seed=1)
    rows = [(row, [slice(row, 1100 + row)]) for row in range(12)]
    heads_THC = random(len(rows), H + 2 * G, C, seed=threads)
    together, alone = (torch.full((len(rows), H, C), torch.nan).bfloat16() for _ in range(2))
    attend(heads_THC, memory, Rows.of([row for row, _ in rows], [runs for _, runs in rows]), together)
    for row, runs in rows:
        attend(heads_THC, memory, Rows.of([row], [runs]), alone)
    assert torch.equal(together, alone)
