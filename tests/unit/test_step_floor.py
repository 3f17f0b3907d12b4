"""Floors of a step: against figures worked out by hand, and as relations."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cluster.config import ParallelConfig
from cluster.footprint import Footprint, footprint
from cluster.step_floor import Hardware, StepFloor, step_floor
from model.config import MixtralConfig

MODEL = MixtralConfig.from_dict({}, "8x7B")
H200 = Hardware("H200", 141 * 10**9, 4.3e12, 989e12, 450e9)


def holds(parallel: ParallelConfig) -> Footprint:
    return footprint(
        MODEL, parallel, itemsize=2, matrix_bytes=lambda height, width: 2 * height * width,
        max_step_tokens=2048, max_running=256,
    )  # fmt: skip


def floor(parallel: ParallelConfig, sequences: int, new_tokens: int = 1, context: int = 1024) -> StepFloor:
    return step_floor(
        MODEL, parallel, holds(parallel), H200,
        sequences=sequences, new_tokens=new_tokens, context=context, itemsize=2,
    )  # fmt: skip


@pytest.mark.parametrize(("sequences", "milliseconds"), [(1, 6.0), (8, 19.8), (32, 22.7), (64, 23.7), (256, 29.7)])
def test_8x7b_on_one_h200(sequences: int, milliseconds: float) -> None:
    """Weights of the experts touched, and the pages of the context, at 4.3 TB/s."""
    assert floor(ParallelConfig(), sequences).total * 1e3 == pytest.approx(milliseconds, abs=0.15)


def test_a_prompt_is_bound_by_arithmetic() -> None:
    found = floor(ParallelConfig(), 1, new_tokens=8192, context=8192)
    assert found.operations > found.memory
    # 12.9 billion weights take part in a token, two operations each, and attention comes on top.
    assert 8192 * 2 * 12.5e9 / 989e12 < found.operations < 8192 * 2 * 14e9 / 989e12


def test_one_rank_waits_for_no_link() -> None:
    assert floor(ParallelConfig(), 8).link == 0
    assert floor(ParallelConfig(tensor=2), 8).link > 0


def test_alone_a_sequence_gains_more_from_cut_experts_than_from_whole_ones() -> None:
    """Two whole experts lie on two of eight ranks; cut, they lie on all."""
    assert floor(ParallelConfig(tensor=8, expert=1), 1).memory < 0.5 * floor(ParallelConfig(tensor=8), 1).memory


def test_more_ranks_read_less_each() -> None:
    steps = [floor(ParallelConfig(tensor=tensor), 64).memory for tensor in (1, 2, 4, 8)]
    assert all(more > less for more, less in pairwise(steps))
