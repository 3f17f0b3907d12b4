"""Quantised weights change no layout's answer: N ranks give what one process gives, wherever its matrices are cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ParallelConfig
from model.modes import Mode
from model.quantized_writer import quantize_checkpoint
from tests.dist.runs import engine_config, record
from tests.dist.test_topologies import EVERYTHING, FAST, check
from tests.quantized_checkpoints import SIZES
from tests.tiny import write_checkpoint

CASES: list[tuple[Mode, ParallelConfig]] = [
    ("int4", ParallelConfig(tensor=2, expert=1)),
    ("fp8", ParallelConfig(tensor=2, data=2, expert=2)),
    ("int8", ParallelConfig(tensor=2, expert=2)),
    ("nf4", ParallelConfig(tensor=4, expert=2)),
]


@pytest.mark.parametrize(("mode", "layout"), CASES if EVERYTHING else CASES[:2])
def test_ranks_give_what_one_process_gives(tmp_path: Path, mode: Mode, layout: ParallelConfig) -> None:
    quantize_checkpoint(write_checkpoint(tmp_path / "plain", **SIZES), tmp_path / mode, mode)
    config = engine_config(tmp_path / mode, layout)
    check(config, record(config), ("all_to_all", "all_reduce"), FAST)
