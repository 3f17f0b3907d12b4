"""Attention by the compiled kernels: heads turned and stored; rows, alone or many of a sequence, over their pages.

T: rows of the step.  B: rows that attend alone.  H, G: query and key-value heads.  C: head_dim.  N: slots of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.native.library import kernels, lies_as

MULTIPLE = 32  # of which head_dim has to be one
BLOCK_ROWS = 128  # of queries that read a block of keys together


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the batch that attend to keys in pages: one token of a sequence each."""

    row_B: Tensor
    keys_B: Tensor  # how many
    first_run_B: Tensor  # where they begin among
    runs: Tensor  # (first slot, slots), one after another
    most_keys: int

    @classmethod
    def of(cls, row_B: Sequence[int], runs_B: Sequence[Sequence[slice]]) -> Rows:
        """From each row and the runs of slots that its keys lie in."""
        keys_B, first_run_B, runs = listed(runs_B)
        return cls(numbers(row_B), numbers(keys_B), numbers(first_run_B), runs, max(keys_B))


@dataclass(frozen=True, slots=True)
class Chunks:
    """Rows that follow one another in the batch and in a sequence: each sees the keys up to its own."""

    chunks: Tensor  # (B, 4): first row, rows, keys of the last row, where those begin among
    runs: Tensor  # (first slot, slots), one after another
    window: int  # keys a row sees; 0: all

    @classmethod
    def of(cls, rows_B: Sequence[range], runs_B: Sequence[Sequence[slice]], window: int | None) -> Chunks:
        """From each chunk's rows and the runs of slots that the keys lie in which any of them sees."""
        keys_B, first_run_B, runs = listed(runs_B)
        quadruples = zip(rows_B, keys_B, first_run_B, strict=True)
        chunks = numbers([n for rows, *others in quadruples for n in (rows.start, len(rows), *others)])
        return cls(chunks.view(-1, 4), runs, window or 0)


def listed(runs_B: Sequence[Sequence[slice]]) -> tuple[list[int], list[int], Tensor]:
    """How many slots each has, which run is its first, and all runs."""
    first_run_B = [0]
    for runs in runs_B:
        first_run_B.append(first_run_B[-1] + len(runs))
    keys_B = [sum(run.stop - run.start for run in runs) for runs in runs_B]
    return (
        keys_B,
        first_run_B[:-1],
        numbers([n for runs in runs_B for run in runs for n in (run.start, run.stop - run.start)]),
    )


def numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def turn_and_store(
    heads_THC: Tensor, angles: tuple[Tensor, Tensor], slot_T: Tensor, memory: tuple[Tensor, Tensor]
) -> None:
    """Turn query and key heads, of H + 2G, where they are; copy keys and values to their slots."""
    key_NGC, value_NGC = memory
    T, heads, C = heads_THC.shape
    G = _kv_heads(heads_THC, memory)
    assert lies_as(slot_T, T, dtype=torch.int64)
    cos, sin = angles
    assert all(lies_as(angle, T, 1, C) for angle in angles)
    kernels().turn_and_store(
        heads_THC.data_ptr(),
        T,
        heads - 2 * G,
        G,
        C,
        cos.data_ptr(),
        sin.data_ptr(),
        slot_T.data_ptr(),
        key_NGC.data_ptr(),
        value_NGC.data_ptr(),
        torch.get_num_threads(),
    )


def attend(heads_THC: Tensor, memory: tuple[Tensor, Tensor], rows: Rows, out_THC: Tensor) -> None:
    """Write what the rows' queries, the first heads, find to their rows of out."""
    key_NGC, value_NGC = memory
    threads = torch.get_num_threads()
    H, G, C = _attending(heads_THC, memory, out_THC)
    room = -(-rows.most_keys // 16) * 16
    scores = torch.empty(threads * (H // G) * room)
    kernels().attend(
        heads_THC.data_ptr(),
        heads_THC.stride(0),
        rows.row_B.data_ptr(),
        len(rows.row_B),
        H,
        G,
        C,
        key_NGC.data_ptr(),
        value_NGC.data_ptr(),
        rows.runs.data_ptr(),
        rows.first_run_B.data_ptr(),
        rows.keys_B.data_ptr(),
        C**-0.5,
        scores.data_ptr(),
        rows.most_keys,
        out_THC.data_ptr(),
        threads,
    )


def attend_chunks(heads_THC: Tensor, memory: tuple[Tensor, Tensor], chunks: Chunks, out_THC: Tensor) -> None:
    """Write what the chunks' queries, the first heads, find to their rows of out. Their own keys are in memory."""
    key_NGC, value_NGC = memory
    threads = torch.get_num_threads()
    H, G, C = _attending(heads_THC, memory, out_THC)
    tokens = max(1, BLOCK_ROWS * G // H)
    room = torch.empty(threads * kernels().bytes_of_room(tokens * (H // G), C), dtype=torch.uint8)
    kernels().attend_chunks(
        heads_THC.data_ptr(),
        chunks.chunks.data_ptr(),
        len(chunks.chunks),
        chunks.window,
        H,
        G,
        C,
        key_NGC.data_ptr(),
        value_NGC.data_ptr(),
        chunks.runs.data_ptr(),
        C**-0.5,
        tokens,
        room.data_ptr(),
        out_THC.data_ptr(),
        threads,
    )


def _attending(heads_THC: Tensor, memory: tuple[Tensor, Tensor], out_THC: Tensor) -> tuple[int, int, int]:
    """H, G and C, of an output with a place for what each query finds."""
    T, H, C = out_THC.shape
    G = _kv_heads(heads_THC, memory)
    assert lies_as(out_THC, T, H, C)
    assert heads_THC.shape == (T, H + 2 * G, C)
    return H, G, C


def _kv_heads(heads_THC: Tensor, memory: tuple[Tensor, Tensor]) -> int:
    """G, of page memory in which keys and values of such heads have a place."""
    N, G, C = memory[0].shape
    assert C % MULTIPLE == 0
    assert lies_as(heads_THC, *heads_THC.shape[:2], C)
    assert all(lies_as(part, N, G, C) for part in memory)
    return G
