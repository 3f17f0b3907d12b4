"""The fused rotation and page write against the two one after the other."""

from __future__ import annotations

import random

import pytest
import torch

from model.rotary import rotate

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels.rope_write import rope_write


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_are_turned_and_written(seed: int, dtype: torch.dtype) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    T, G, C, slots = rng.randint(1, 3), rng.randint(1, 4), 2 * rng.randint(1, 40), 12
    H = G * rng.randint(1, 5)
    heads_THC = torch.randn(T, H + 2 * G, C, generator=generator).to(dtype)
    angle_T1P = torch.randn(T, 1, C // 2, generator=generator) * 9
    cos_T1C, sin_T1C = (torch.cat((x, x), -1).to(dtype) for x in (angle_T1P.cos(), angle_T1P.sin()))
    slot_T = torch.tensor(rng.sample(range(slots), T))
    memory = torch.zeros(slots, G, C, dtype=dtype), torch.zeros(slots, G, C, dtype=dtype)

    query_THC = rope_write(heads_THC, (cos_T1C, sin_T1C), slot_T, memory)

    rotated_THC = rotate(heads_THC[:, : H + G].float(), cos_T1C.float(), sin_T1C.float()).to(dtype)
    key_NGC = torch.zeros_like(memory[0]).index_copy_(0, slot_T, rotated_THC[:, H:])
    value_NGC = torch.zeros_like(memory[1]).index_copy_(0, slot_T, heads_THC[:, H + G :])
    for found, expected in zip(
        (query_THC, *memory), (rotated_THC[:, :H].contiguous(), key_NGC, value_NGC), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


def test_no_rows() -> None:
    memory = torch.zeros(4, 1, 8), torch.zeros(4, 1, 8)
    angles = torch.empty(0, 1, 8), torch.empty(0, 1, 8)
    found = rope_write(torch.empty(0, 4, 8), angles, torch.empty(0, dtype=torch.int64), memory)
    assert found.shape == (0, 2, 8)
    assert not any(x.any() for x in memory)
