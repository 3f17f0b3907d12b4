"""Attention by the compiled kernels: heads turned and stored, single rows over the pages of their context.

T: rows of the step.  B: rows that attend alone.  H, G: query and key-value heads.  C: head_dim.  N: slots of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.native.library import kernels

MULTIPLE = 32  # of which head_dim has to be one


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the batch that attend to keys in pages: one token of a sequence each."""

    row_B: Tensor
    keys_B: Tensor  # how many
    first_run_B: Tensor  # where they begin among
    runs: Tensor  # (first slot, slots), one after another
    most_keys: int

    @classmethod
    def of(cls, runs_of: Sequence[tuple[int, Sequence[slice]]]) -> Rows:
        """From each row and the runs of slots that its keys lie in."""
        first_run: list[int] = []
        keys: list[int] = []
        flat: list[int] = []
        for _, runs in runs_of:
            first_run.append(len(flat) // 2)
            for run in runs:
                flat += (run.start, run.stop - run.start)
            keys.append(sum(flat[2 * first_run[-1] + 1 :: 2]))
        row_B, keys_B, first_run_B, run_numbers = (
            torch.tensor(numbers, dtype=torch.int64) for numbers in ([row for row, _ in runs_of], keys, first_run, flat)
        )
        return cls(row_B, keys_B, first_run_B, run_numbers, max(keys))


def turn_and_store(
    heads_THC: Tensor, angles: tuple[Tensor, Tensor], slot_T: Tensor, memory: tuple[Tensor, Tensor]
) -> None:
    """Turn query and key heads, of H + 2G, where they are; copy keys and values to their slots."""
    key_NGC, value_NGC = memory
    T, heads, C = heads_THC.shape
    G = key_NGC.shape[1]
    assert heads_THC.is_contiguous()
    cos, sin = angles
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
    _, H, C = out_THC.shape
    G = key_NGC.shape[1]
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
