"""A canary finds what is wrong and names it, on every rank; and nothing where all is well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig, ParallelConfig
from cluster.errors import StepFailed
from cluster.messages import Exchange, StepPlan
from cluster.placement import Placement, even_placement
from cluster.rendezvous import has_shared_memory
from cluster.worker import Worker
from model.comm import Groups, alone
from model.layers import make_linear
from tests.threaded_ranks import on_groups
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.skipif(not has_shared_memory(), reason="shared memory transport is for x86-64 Linux")

E = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def placement_of(parallel: ParallelConfig) -> Placement:
    return even_placement(2, E, parallel.ranks, parallel.expert_slices, parallel.spare_slots)


def worker(checkpoint: Path, parallel: ParallelConfig, groups: Groups) -> Worker:
    made = Worker(groups.world.rank, EngineConfig(str(checkpoint), parallel=parallel), placement_of(parallel))
    made.load()
    made.join(groups, num_pages=1)
    return made


def spoil(worker: Worker, layer: int, slot: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Something happens to one expert's weights after they were loaded."""
    blocks = list(worker._held.weights.blocks)
    experts = list(blocks[layer].experts)
    experts[slot] = replace(experts[slot], down=make_linear(change(experts[slot].down.weight_OI)))
    blocks[layer] = replace(blocks[layer], experts=tuple(experts))
    held = replace(worker._held, weights=replace(worker._held.weights, blocks=tuple(blocks)))
    worker._use(held)


def fault(worker: Worker, exchange: Exchange, step: int = 0) -> str:
    try:
        result = worker.step(StepPlan(step, (), exchange=exchange, canary=True, report_load=True))
    except StepFailed as failure:
        return str(failure)
    assert result.seqs == result.token_ids == ()
    assert set(map(sum, result.slot_rows)) == {0}, "made-up rows are nobody's load"
    return ""


@pytest.mark.parametrize(
    ("parallel", "holders"),
    [
        (ParallelConfig(2), "rank 1"),
        (ParallelConfig(1, 2), "rank 1"),
        (ParallelConfig(2, spare_slots=1), "rank 1"),
        (ParallelConfig(2, 2, expert=2), "rank 0+1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("exchange", ["all_to_all", "all_reduce"])
def test_what_is_wrong_is_named_by_all(
    checkpoint: Path, parallel: ParallelConfig, holders: str, exchange: Exchange
) -> None:
    def rank_main(groups: Groups) -> tuple[str, str, int]:
        one = worker(checkpoint, parallel, groups)
        fine = fault(one, exchange) + fault(one, exchange, step=1)
        if groups.world.rank == 1:
            spoil(one, 1, 1, lambda weight_OI: weight_OI * 1.01)
        else:
            one._use(one._held)  # all ranks tell each other their answers again
        return fine, fault(one, exchange, step=2), one._held.placement.slots_of(1)[1][1]

    for rank, (fine, found, expert) in enumerate(on_groups(parallel.tensor, parallel.data, rank_main)):
        assert fine == ""
        assert found.startswith(f"a canary found on rank {rank}: in layer 1 "), found
        assert found.endswith(f"loaded: expert {expert} ({holders})"), found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_value_that_is_none_is_a_fault(checkpoint: Path, value: float) -> None:
    one = worker(checkpoint, ParallelConfig(), alone())
    assert fault(one, "none") == ""
    spoil(one, 0, 2, lambda weight_OI: torch.full_like(weight_OI, value))
    assert fault(one, "none", step=1).endswith("in layer 0 not what was given when they were loaded: expert 2 (rank 0)")
