"""Each kind of fault over HTTP on real actors: no client sees an error, no token is lost, repeated or changed.

The same sixteen streams run once undisturbed; then again and again while something goes wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from time import monotonic

import httpx
import pytest
from ray import cloudpickle

from cluster.launch import CRASHES
from cluster.ray_rank import session_directory
from tests.cluster import faults
from tests.cluster.served import Served, eventually, lives, served
from tests.cluster.traffic import TOKENS, Answer, Run, bodies

cloudpickle.register_pickle_by_value(faults)  # a rank's process does not know the tests

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def server(local_ray: None) -> Iterator[Served]:
    with served(parallel={"tensor": 2}) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: Served) -> list[Answer]:
    async def run() -> list[Answer]:
        return await Run(server.url, bodies()).done()

    answers = asyncio.run(run())
    assert len(answers) == 16
    assert all(len(tokens) == TOKENS for answer in answers[:12] for tokens in answer.tokens.values())
    return answers


class Trial:
    """One run of the streams with a fault in the middle."""

    def __init__(self, server: Served, name: str) -> None:
        self.server = server
        self.name = name
        self.before = server.engine.stats().recoveries
        self.pids = server.pids
        self.failures, self.pauses = len(server.notes.failures), len(server.notes.pauses)
        self.run = Run(server.url, bodies())

    async def ends(self, undisturbed: list[Answer], *causes: str) -> None:
        """The streams are what they were without the fault, and it was taken for what it is."""
        assert await self.run.done() == undisturbed
        await asyncio.to_thread(self.server.settled, self.before + 1)
        notes = self.server.notes
        print(f"{self.name}: pause {sum(notes.pauses[self.pauses :]):.2f} s")
        assert notes.failures[self.failures :] == list(causes)
        health = httpx.get(f"{self.server.url}/health").json()
        assert health["status"] == "healthy"
        assert {rank["state"] for rank in health["ranks"]} == {"ready"}
        assert self.server.engine.stats().pages_used == 0


async def test_all_ranks_are_killed_at_once(server: Served, undisturbed: list[Answer]) -> None:
    trial = Trial(server, "killed [0, 1]")
    await trial.run.under_way()
    for pid in trial.pids:
        os.kill(pid, signal.SIGKILL)
    await trial.ends(undisturbed, "died")
    assert not set(server.pids) & set(trial.pids)


async def test_a_rank_is_killed_while_long_prompts_are_computed(server: Served) -> None:
    wanted = [
        ("/v1/completions", body | {"prompt": body["prompt"] + " the quick brown fox" * 150, "max_tokens": 8})
        for _, body in bodies()[:4]
    ]
    expected = await Run(server.url, wanted).done()
    salted = [(path, body | {"cache_salt": "another run"}) for path, body in wanted]  # the first run's pages are no use
    before = server.engine.stats().recoveries
    run = Run(server.url, salted)
    while not server.engine.stats().running:
        await asyncio.sleep(0.001)
    os.kill(server.pids[1], signal.SIGKILL)
    assert await run.done() == expected
    assert server.engine.stats().recoveries == before + 1


async def test_a_rank_dies_again_while_it_is_loaded_and_again_once_it_is_there(
    server: Served, undisturbed: list[Answer]
) -> None:
    trial = Trial(server, "killed in service, while loading, and again")
    await trial.run.under_way()
    os.kill(trial.pids[1], signal.SIGKILL)
    loading = await _until_loading(server, 1, trial.pids[1])
    os.kill(loading, signal.SIGKILL)
    await asyncio.to_thread(server.settled, trial.before + 2)
    os.kill(server.pids[1], signal.SIGKILL)
    await trial.ends(undisturbed, "died", "died")


async def _until_loading(server: Served, number: int, before: int) -> int:
    """The process that is being loaded in the place of another."""
    while True:
        rank = server.engine.ranks()[number]
        if rank.pid not in (0, before):
            return rank.pid
        await asyncio.sleep(0.001)


async def test_data_groups_that_are_whole_keep_their_pages(undisturbed: list[Answer]) -> None:
    with served(parallel={"data": 2}) as server:
        trial = Trial(server, "killed one of two data groups")
        await trial.run.under_way()
        computed = server.engine.stats().prompt_tokens
        os.kill(trial.pids[1], signal.SIGKILL)
        await trial.ends(undisturbed, "died")
        again = server.engine.stats().prompt_tokens - computed
        prompts = sum(answer.usage["prompt_tokens"] for answer in undisturbed)
        assert 0 < again < prompts, f"{again} of {prompts} prompt tokens were computed again"


async def test_a_process_that_stands_by_takes_over_and_another_stands_by_for_the_next(
    undisturbed: list[Answer],
) -> None:
    with served(parallel={"tensor": 2, "standby": 1}) as server:
        for victim, survivor in ((1, 0), (0, 1)):
            standby = await asyncio.to_thread(server.standby)
            trial = Trial(server, f"killed [{victim}], with a standby")
            await trial.run.under_way()
            os.kill(trial.pids[victim], signal.SIGKILL)
            await trial.ends(undisturbed, "died")
            assert server.pids[victim] == standby
            assert server.pids[survivor] == trial.pids[survivor], "survivors keep their process and their weights"
        last = await asyncio.to_thread(server.standby)
    await asyncio.to_thread(eventually, lambda: not lives(last), "the last standby has ended too")


async def test_experts_move_while_streams_run_also_after_a_death_in_the_middle(undisturbed: list[Answer]) -> None:
    with served(parallel={"tensor": 2, "spare_slots": 2, "exchange": "all_to_all"}) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            await asyncio.to_thread(server.inside, 0, faults.slow_fetch, 1.0)
            run = Run(server.url, bodies())
            await run.under_way()
            await asyncio.to_thread(eventually, lambda: any(map(any, server.engine.experts().load)), "load is known")
            moving = asyncio.ensure_future(client.post("/v1/experts/rebalance"))
            await asyncio.sleep(0.3)
            os.kill(server.pids[1], signal.SIGKILL)
            assert (await moving).status_code == 503
            assert await run.done() == undisturbed
            await asyncio.to_thread(server.settled, 1)
            assert server.engine.experts().placement == 0, "the old placement stays"

            run = Run(server.url, bodies())
            await run.under_way()
            moved = await client.post("/v1/experts/rebalance")
            assert moved.status_code == 200, moved.text
            before, after = (max(moved.json()[f"imbalance_{when}"]) for when in ("before", "after"))
            print(f"rebalance: {moved.json()['moves']} slots, busiest layer {before:.2f} -> {after:.2f} of the mean")
            assert await run.done() == undisturbed
            assert server.notes.moves == [moved.json()["moves"]]
            assert server.engine.experts().placement == 1

            run = Run(server.url, bodies())
            await run.under_way()
            pids = server.pids
            os.kill(pids[0], signal.SIGKILL)
            assert await run.done() == undisturbed, "a new rank loads what the placement says"
            assert [old == new for old, new in zip(pids, server.pids, strict=True)] == [False, True]
            assert server.notes.canaries.count(False) == 0


async def test_a_rank_is_stopped(server: Served, undisturbed: list[Answer]) -> None:
    trial = Trial(server, "stopped")
    await trial.run.under_way()
    stopped = monotonic()
    os.kill(trial.pids[1], signal.SIGSTOP)
    await trial.ends(undisturbed, "frozen")
    print(f"stopped: found after {server.notes.failed_at[-1] - stopped:.2f} s")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
async def test_a_rank_raises_in_a_step(server: Served, undisturbed: list[Answer], error: type[Exception]) -> None:
    trial = Trial(server, error.__name__)
    await trial.run.under_way()
    await asyncio.to_thread(server.inside, 1, faults.fail_next_step, error)
    await trial.ends(undisturbed, "step_failed")
    assert server.pids == trial.pids, "nobody died"
    bundle = json.loads(max((session_directory() / CRASHES).iterdir()).read_text())
    assert (bundle["cause"], error.__name__ in bundle["failure"]) == ("step_failed", True)
    assert "experts 4 5 6 7" in bundle["failure"]
    assert all("rank_actor.py" in report["stacks"] for report in bundle["reports"])
    assert len(bundle["reports"]) == 2


async def test_the_connection_between_ranks_breaks(server: Served, undisturbed: list[Answer]) -> None:
    trial = Trial(server, "connection")
    await trial.run.under_way()
    await asyncio.to_thread(server.inside, 0, faults.break_connection)
    await trial.ends(undisturbed, "step_failed")
    assert server.pids == trial.pids


@pytest.mark.parametrize(("step", "seconds"), [(faults.compute_for, 6.0), (faults.hold_interpreter, 3.0)])
async def test_a_long_step_kills_nobody(
    server: Served, undisturbed: list[Answer], step: object, seconds: float
) -> None:
    before = server.engine.stats().recoveries
    pids = server.pids
    run = Run(server.url, bodies())
    await run.under_way()
    await asyncio.to_thread(server.inside, 1, step, seconds)
    assert await run.done() == undisturbed
    assert server.engine.stats().recoveries == before
    assert server.pids == pids


async def test_a_request_that_kills_its_ranks_fails_alone(server: Served, undisturbed: list[Answer]) -> None:
    poison = 1399
    await asyncio.to_thread(server.inside, 1, faults.fail_for_token, poison)
    before = server.engine.stats().recoveries
    run = Run(server.url, bodies()[:15])
    await run.under_way()
    body = {"model": "mixtral-demo", "prompt": [5, 6, poison, 7], "max_tokens": 4}
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "request_crashes_ranks"
    assert await run.done() == undisturbed[:15]
    assert server.engine.stats().recoveries == before + 3
