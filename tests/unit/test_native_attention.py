"""Attention by the compiled kernels, beside the CPU's own in float32."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.attention import attend as oracle
from model.native import library
from model.native.attention import Chunks, Rows, attend, attend_chunks, turn_and_store
from model.rotary import rotate

pytestmark = pytest.mark.skipif(
    not library.has_kernels(), reason="no C compiler at installation, or no AVX-512 with BF16 in this processor"
)
HEADS = [(1, 1, 32), (4, 4, 64), (6, 2, 96), (8, 2, 128), (8, 1, 32), (7, 1, 160)]  # H, G, C


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def runs_of(keys: int, slots: int, rng: random.Random) -> list[slice]:
    """So many keys, somewhere in memory, in pieces of random lengths."""
    runs = []
    while keys:
        length = min(keys, rng.choice([1, 5, 16, 40]))
        first = rng.randrange(slots - length)
        runs.append(slice(first, first + length))
        keys -= length
    return runs


def rows_of(rows: Sequence[tuple[int, Sequence[slice]]]) -> Rows:
    return Rows.of([row for row, _ in rows], [runs for _, runs in rows])


@pytest.mark.parametrize(("H", "G", "C"), HEADS)
@pytest.mark.parametrize("threads", [1, 2])
def test_single_rows_attend_to_keys_wherever_they_lie(H: int, G: int, C: int, threads: int) -> None:
    rng = random.Random(H * C)
    memory = normal(200, G, C), normal(200, G, C, seed=1)
    lengths = [1, 2, 15, 16, 17, 33, 150, 1000]
    rows = [(row, runs_of(keys, 200, rng)) for row, keys in zip(rng.sample(range(12), 8), lengths, strict=True)]
    heads_THC = normal(12, H + 2 * G, C, seed=2)
    out_THC = torch.full((12, H, C), 7.0).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    attend(heads_THC, memory, rows_of(rows), out_THC)
    torch.set_num_threads(before)
    for row, runs in rows:
        key_MGC, value_MGC = (torch.cat([part[run] for run in runs]).float() for part in memory)
        expected_1HC, _ = oracle(heads_THC[row : row + 1, :H].float(), key_MGC, value_MGC)
        torch.testing.assert_close(out_THC[row].float(), expected_1HC[0], rtol=2**-7, atol=2**-8)
    others = sorted(set(range(12)) - {row for row, _ in rows})
    assert torch.all(out_THC[others] == 7)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = random.Random(0)
    memory = normal(200, 2, 64), normal(200, 2, 64, seed=1)
    rows = [(row, runs_of(keys, 200, rng)) for row, keys in enumerate([40, 3, 200])]
    heads_THC = normal(3, 8, 64)
    together, alone = (torch.empty(3, 4, 64, dtype=torch.bfloat16) for _ in range(2))
    attend(heads_THC, memory, rows_of(rows), together)
    for one in rows:
        attend(heads_THC, memory, rows_of([one]), alone)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("H", "G", "C"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_attend_to_what_came_before_and_to_themselves(
    H: int, G: int, C: int, window: int | None, threads: int
) -> None:
    rng = random.Random(H * C + (window or 0))
    memory = normal(700, G, C), normal(700, G, C, seed=1)
    lengths, contexts, first = [2, 33, 150, 17], [2, 300, 150, 41], 3
    heads_THC = normal(sum(lengths) + 5, H + 2 * G, C, seed=2)
    out_THC = torch.full((len(heads_THC), H, C), 7.0).bfloat16()
    rows, runs, expected = [], [], []
    for length, context in zip(lengths, contexts, strict=True):
        rows.append(range(first, first + length))
        oldest = 0 if window is None else max(0, context - length + 1 - window)
        runs.append(runs_of(context - oldest, 700, rng))
        key_MGC, value_MGC = (torch.cat([part[run] for run in runs[-1]]).float() for part in memory)
        position_L1, key_M = torch.arange(context - length, context)[:, None], torch.arange(oldest, context)
        seen_LM = (key_M <= position_L1) & (key_M > position_L1 - (window or context))
        mask_LM = torch.zeros(seen_LM.shape).masked_fill_(~seen_LM, float("-inf"))
        expected.append(oracle(heads_THC[rows[-1], :H].float(), key_MGC, value_MGC, mask_LM=mask_LM)[0])
        first += length
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    attend_chunks(heads_THC, memory, Chunks.of(rows, runs, window), out_THC)
    torch.set_num_threads(before)
    torch.testing.assert_close(out_THC[3:first].float(), torch.cat(expected), rtol=2**-6, atol=2**-6)
    assert torch.all(out_THC[:3] == 7)
    assert torch.all(out_THC[first:] == 7)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    key = torch.zeros(20, 1, 32, dtype=torch.bfloat16)
    key[3], key[17] = 300, -300
    memory = key, normal(20, 1, 32)
    out_THC = torch.empty(1, 1, 32, dtype=torch.bfloat16)
    attend(torch.full((1, 3, 32), 300.0).bfloat16(), memory, rows_of([(0, [slice(0, 20)])]), out_THC)
    assert torch.equal(out_THC[0, 0], memory[1][3, 0])


@pytest.mark.parametrize("T", [0, 1, 5, 40])
@pytest.mark.parametrize(("H", "G", "C"), HEADS)
def test_heads_are_turned_and_stored(T: int, H: int, G: int, C: int) -> None:
    heads_THC, angle = normal(T, H + 2 * G, C), torch.rand(T, 1, C // 2) * 6
    cos, sin = (torch.cat((part, part), -1).bfloat16() for part in (angle.cos(), angle.sin()))
    memory = torch.zeros(64, G, C, dtype=torch.bfloat16), torch.zeros(64, G, C, dtype=torch.bfloat16)
    slot_T = torch.randperm(64)[:T]
    turned_THC = heads_THC.clone()
    turn_and_store(turned_THC, (cos, sin), slot_T, memory)
    expected = rotate(heads_THC[:, : H + G].float(), cos.float(), sin.float())
    torch.testing.assert_close(turned_THC[:, : H + G].float(), expected, rtol=2**-8, atol=2**-8)
    assert torch.equal(turned_THC[:, H + G :], heads_THC[:, H + G :])
    assert torch.equal(memory[0][slot_T], turned_THC[:, H : H + G])
    assert torch.equal(memory[1][slot_T], heads_THC[:, H + G :])
    untouched = sorted(set(range(64)) - set(slot_T.tolist()))
    assert not any(part[untouched].any() for part in memory)


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": normal(3, 4, 64).float()},
        {"heads": normal(4, 3, 64).transpose(0, 1)},
        {"heads": normal(3, 4, 32)},
        {"slots": torch.arange(3).int()},
        {"slots": torch.arange(2)},
        {"slots": torch.arange(6)[::2]},
        {"cos": normal(3, 1, 64).float()},
        {"cos": normal(2, 1, 64)},
        {"keys": normal(8, 1, 64).half()},
        {"keys": normal(8, 2, 64)[:, :1]},
    ],
)
def test_what_would_be_read_or_written_past_never_reaches_a_kernel(wrong: dict[str, Tensor]) -> None:
    right = {"heads": normal(3, 4, 64), "slots": torch.arange(3), "cos": normal(3, 1, 64), "keys": normal(8, 1, 64)}
    given = right | wrong
    memory = given["keys"], normal(8, 1, 64)
    with pytest.raises(AssertionError):
        turn_and_store(given["heads"], (given["cos"], normal(3, 1, 64)), given["slots"], memory)
