"""Ranks as Ray actors: the same text as in one process, deaths that are known at once, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from time import monotonic

import pytest
import pytest_asyncio

from cluster.config import EngineConfig, ParallelConfig
from cluster.engine import Engine
from cluster.launch import launch, launch_in_process
from cluster.messages import Request, SamplingParams
from cluster.worker_group import RayGroup
from tests.notes import Notes
from tests.tiny import write_checkpoint

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.asyncio(loop_scope="module")]

PROMPTS = ("the router", "a page remembers", "five boxing wizards", "tokens travel far")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def config(checkpoint: Path, tensor: int) -> EngineConfig:
    return EngineConfig(str(checkpoint), parallel=ParallelConfig(tensor=tensor, cpus_per_rank=0.5))


class OneActor:
    """An engine with a single rank, which one test after another hurts."""

    def __init__(self, engine: Engine, notes: Notes) -> None:
        self.engine = engine
        self.notes = notes
        self.pids: list[int] = []  # of every process that was the rank

    @property
    def pid(self) -> int:
        [rank] = self.engine.ranks()
        if rank.pid not in self.pids:
            self.pids.append(rank.pid)
        return rank.pid

    async def serves_again(self, recoveries: int) -> None:
        await _until(lambda: self.engine.stats().recoveries == recoveries and self.engine.ready, seconds=60)
        assert {rank.state for rank in self.engine.ranks()} == {"ready"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_actor(checkpoint: Path, local_ray: None) -> AsyncIterator[OneActor]:
    notes = Notes()
    one = OneActor(await launch(config(checkpoint, 1), observer=notes), notes)
    yield one
    pids = [*one.pids, one.pid]
    await one.engine.stop()
    await _gone(pids)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(checkpoint: Path) -> tuple[list[str], list[str]]:
    """What one process answers and streams."""
    alone = await launch_in_process(config(checkpoint, 1))
    try:
        return await answers(alone), await streams(alone, {})
    finally:
        await alone.stop()


async def answer(engine: Engine, name: str, prompt: str, **sampling: object) -> str:
    ids = tuple(engine.tokenizer.encode(prompt))
    params = SamplingParams(max_tokens=24, **sampling)  # type: ignore[arg-type]
    return "".join([event.text async for event in engine.generate(Request(name, ids, params))])


async def answers(engine: Engine) -> list[str]:
    """Greedy and seeded, all at once."""
    greedy = [answer(engine, f"g{n}", prompt, temperature=0.0) for n, prompt in enumerate(PROMPTS)]
    seeded = [answer(engine, f"s{n}", prompt, temperature=0.9, seed=n) for n, prompt in enumerate(PROMPTS)]
    return await asyncio.gather(*greedy, *seeded)


async def test_one_process_and_one_actor_give_the_same_text(
    one_actor: OneActor, undisturbed: tuple[list[str], list[str]]
) -> None:
    expected, _ = undisturbed
    assert len(set(expected)) > len(PROMPTS)
    assert await answers(one_actor.engine) == expected
    assert one_actor.pid != os.getpid()


async def test_two_actors_give_the_same_text_also_when_one_dies_while_they_start(
    checkpoint: Path, undisturbed: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    form, victims = RayGroup._form, list[int]()

    def form_without_one(group: RayGroup) -> None:
        if not victims:
            victims.append(max(rank.pid for rank in group.ranks()))
            os.kill(victims[0], signal.SIGKILL)
        form(group)

    monkeypatch.setattr(RayGroup, "_form", form_without_one)
    two_actors = await launch(config(checkpoint, 2))
    try:
        ranks = two_actors.ranks()
        assert [rank.rank for rank in ranks] == [0, 1]
        assert {rank.state for rank in ranks} == {"ready"}
        assert not {os.getpid(), *victims} & {rank.pid for rank in ranks}
        assert await answers(two_actors) == undisturbed[0]
        assert two_actors.stats().recoveries == 0, "the start was tried again"
    finally:
        await two_actors.stop()
    await _gone([rank.pid for rank in ranks])


async def stream(engine: Engine, name: str, prompt: str, progress: dict[str, int], **sampling: object) -> str:
    """The text of 60 tokens; counts them in `progress` as they come. Fails on an error event."""
    params = SamplingParams(max_tokens=60, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    text = ""
    async for event in engine.generate(Request(name, tuple(engine.tokenizer.encode(prompt)), params)):
        assert event.error is None
        progress[name] = progress.get(name, 0) + len(event.token_ids)
        text += event.text
    assert progress[name] == 60
    return text


async def streams(engine: Engine, progress: dict[str, int]) -> list[str]:
    return await asyncio.gather(
        *(stream(engine, f"greedy{n}", p, progress, temperature=0.0) for n, p in enumerate(PROMPTS)),
        *(stream(engine, f"seeded{n}", p, progress, temperature=0.9, seed=n) for n, p in enumerate(PROMPTS)),
    )


async def test_when_the_only_rank_is_killed_no_stream_loses_or_repeats_a_token(
    one_actor: OneActor, undisturbed: tuple[list[str], list[str]]
) -> None:
    engine, (_, expected) = one_actor.engine, undisturbed
    before = engine.stats().recoveries
    progress: dict[str, int] = {}
    running = asyncio.ensure_future(streams(engine, progress))
    await _until(lambda: progress and min(progress.values()) >= 5)
    began = monotonic()
    os.kill(one_actor.pid, signal.SIGKILL)
    await one_actor.serves_again(before + 1)
    print(f"serving again after {monotonic() - began:.2f} s")
    assert await running == expected
    assert engine.stats().pages_used == 0


async def test_the_only_rank_is_found_and_replaced_when_it_freezes(
    one_actor: OneActor, undisturbed: tuple[list[str], list[str]]
) -> None:
    engine, (_, expected) = one_actor.engine, undisturbed
    before, failures = engine.stats().recoveries, len(one_actor.notes.failures)
    progress: dict[str, int] = {}
    running = asyncio.ensure_future(streams(engine, progress))
    await _until(lambda: progress and min(progress.values()) >= 5)
    began = monotonic()
    frozen = one_actor.pid
    os.kill(frozen, signal.SIGSTOP)
    await _until(lambda: one_actor.notes.failures[failures:] == ["frozen"], seconds=60)
    print(f"found after {monotonic() - began:.2f} s")
    await one_actor.serves_again(before + 1)
    print(f"serving again after {monotonic() - began:.2f} s")
    assert await running == expected
    await _gone([frozen])


async def test_a_death_while_idle_is_mended_before_anybody_asks(one_actor: OneActor) -> None:
    before = one_actor.engine.stats().recoveries
    os.kill(one_actor.pid, signal.SIGKILL)
    await one_actor.serves_again(before + 1)
    assert await answer(one_actor.engine, "r", "the router", temperature=0.0)


async def _gone(pids: list[int]) -> None:
    await _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


async def _until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.01)
