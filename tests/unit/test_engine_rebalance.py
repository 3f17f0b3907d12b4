"""Engine.rebalance: experts move by the load, once at a time, or stay where they were and somebody is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cluster.config import ParallelConfig
from cluster.engine import Engine
from cluster.errors import EngineNotReady, StepFailed
from cluster.placement import Placement
from tests.fake_group import FakeGroup
from tests.unit.engine_rig import collect, request, running_engine

ROWS = ((1, 90, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1))  # slots 0 1 2 on rank 0, 2 3 0 on rank 1: expert 1 is busy


@asynccontextmanager
async def loaded_engine(group: FakeGroup) -> AsyncIterator[Engine]:
    """With one expert of the first layer far busier than all others."""
    group.slot_rows = ROWS
    async with running_engine(group, parallel=ParallelConfig(tensor=2)) as engine:
        await engine.proved()
        await collect(engine, request("first"))
        yield engine


async def test_experts_move_to_where_they_are_used() -> None:
    group = FakeGroup(64, 4)
    async with loaded_engine(group) as engine:
        before = engine.experts()
        done = await engine.rebalance()
        after = engine.experts()
        assert done.moves > 0
        assert done.after[0] < done.before[0]
        assert done.before[0] == pytest.approx(before.imbalance[0])
        assert (before.placement, after.placement, group.placement) == (0, 1, 1)
        assert after.imbalance[0] == pytest.approx(done.after[0])
        assert await collect(engine, request("second"))


async def test_what_is_even_stays() -> None:
    group = FakeGroup(64, 4)
    async with running_engine(group, parallel=ParallelConfig(tensor=2)) as engine:
        assert (await engine.rebalance()).moves == 0
        assert group.fetched is None


async def test_nothing_moves_while_ranks_are_replaced() -> None:
    """They are told where experts sit by the recovery itself, and would forget what they fetched for the move."""
    group = FakeGroup(64, 4)
    begun, held = threading.Event(), threading.Event()
    recover = group.recover

    def recover_slowly(*, anew: bool = False) -> frozenset[int]:
        lost = recover(anew=anew)
        begun.set()
        held.wait()
        return lost

    async with loaded_engine(group) as engine:
        group.recover = recover_slowly  # type: ignore[method-assign]
        engine.rank_lost("rank 1 died", group.epoch)
        assert await asyncio.to_thread(begun.wait, 10)
        asked = asyncio.create_task(engine.rebalance())
        try:
            await asyncio.wait((asked,), timeout=0.02)
        finally:
            held.set()
        with pytest.raises(EngineNotReady, match="being replaced"):
            await asked
        assert group.fetched is None


async def test_a_second_one_is_told_to_wait_for_the_first() -> None:
    group = FakeGroup(64, 4)
    held = threading.Event()
    fetch = group.fetch

    def fetch_slowly(placement: Placement) -> None:
        held.wait()
        fetch(placement)

    group.fetch = fetch_slowly  # type: ignore[method-assign]
    async with loaded_engine(group) as engine:
        first = asyncio.ensure_future(engine.rebalance())
        await asyncio.sleep(0)
        with pytest.raises(EngineNotReady, match="already"):
            await engine.rebalance()
        held.set()
        assert (await first).moves > 0


async def test_a_death_while_ranks_fetch_leaves_experts_where_they_were() -> None:
    group = FakeGroup(64, 4)

    def die(placement: Placement) -> None:
        raise StepFailed("rank 1 died", "died")

    group.fetch = die  # type: ignore[method-assign]
    async with loaded_engine(group) as engine:
        with pytest.raises(EngineNotReady, match="where they were"):
            await engine.rebalance()
        assert engine.experts().placement == 0


async def test_a_recovery_between_fetching_and_moving_leaves_experts_where_they_were() -> None:
    group = FakeGroup(64, 4)
    fetch = group.fetch

    def fetch_and_form_anew(placement: Placement) -> None:
        fetch(placement)
        group.epoch += 1

    group.fetch = fetch_and_form_anew  # type: ignore[method-assign]
    async with loaded_engine(group) as engine:
        with pytest.raises(EngineNotReady, match="where they were"):
            await engine.rebalance()
        assert (engine.experts().placement, group.placement) == (0, 0)


async def test_one_that_comes_too_late_is_answered_too() -> None:
    group = FakeGroup(64, 4)
    async with loaded_engine(group) as engine:
        group.fail_with = RuntimeError("the engine cannot go on")
        await collect(engine, request("last"))
        assert not engine.healthy
        with pytest.raises(EngineNotReady, match="where they were"):
            await engine.rebalance()
