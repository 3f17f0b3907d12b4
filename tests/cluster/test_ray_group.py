"""Ranks as Ray actors: the same text as in one process, deaths that are known at once, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest

from cluster.config import EngineConfig, ParallelConfig
from cluster.engine import Engine
from cluster.launch import launch, launch_in_process
from cluster.messages import Request, SamplingParams
from cluster.observer import Silence
from cluster.placement import even_placement
from cluster.worker_group import RayGroup
from deployments.resolve import Machine, resolve
from deployments.settings import load
from model.errors import CheckpointError
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.usefixtures("local_ray")

PROMPTS = ("the router", "a page remembers", "five boxing wizards", "tokens travel far")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def config(checkpoint: Path, tensor: int) -> EngineConfig:
    return EngineConfig(str(checkpoint), parallel=ParallelConfig(tensor=tensor, cpus_per_rank=0.5))


async def answer(engine: Engine, name: str, prompt: str, **sampling: object) -> str:
    ids = tuple(engine.tokenizer.encode(prompt))
    params = SamplingParams(max_tokens=24, **sampling)  # type: ignore[arg-type]
    return "".join([event.text async for event in engine.generate(Request(name, ids, params))])


async def answers(engine: Engine) -> list[str]:
    """Greedy and seeded, all at once."""
    greedy = [answer(engine, f"g{n}", prompt, temperature=0.0) for n, prompt in enumerate(PROMPTS)]
    seeded = [answer(engine, f"s{n}", prompt, temperature=0.9, seed=n) for n, prompt in enumerate(PROMPTS)]
    return await asyncio.gather(*greedy, *seeded)


async def test_one_process_one_actor_and_two_actors_give_the_same_text(checkpoint: Path) -> None:
    alone = await launch_in_process(config(checkpoint, 1))
    expected = await answers(alone)
    await alone.stop()
    assert len(set(expected)) > len(PROMPTS)
    for tensor in (1, 2):
        engine = await launch(config(checkpoint, tensor))
        try:
            assert await answers(engine) == expected
            ranks = engine.ranks()
            assert [rank.rank for rank in ranks] == list(range(tensor))
            assert {rank.state for rank in ranks} == {"ready"}
            assert os.getpid() not in {rank.pid for rank in ranks}
        finally:
            await engine.stop()
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


async def test_when_the_only_rank_is_killed_twice_no_stream_loses_or_repeats_a_token(checkpoint: Path) -> None:
    alone = await launch_in_process(config(checkpoint, 1))
    expected = await streams(alone, {})
    await alone.stop()
    engine = await launch(config(checkpoint, 1))
    try:
        before = engine.ranks()
        for kill in range(2):  # the second time in the group that the first recovery made
            progress: dict[str, int] = {}
            running = asyncio.ensure_future(streams(engine, progress))
            await _until(lambda progress=progress: progress and min(progress.values()) >= 5)
            began = monotonic()
            os.kill(engine.ranks()[0].pid, signal.SIGKILL)
            await _until(lambda kill=kill: engine.stats().recoveries > kill and engine.ready, seconds=60)
            print(f"serving again after {monotonic() - began:.2f} s")
            assert await running == expected
        after = engine.ranks()
        assert {rank.state for rank in after} == {"ready"}
        assert engine.stats().pages_used == 0
    finally:
        await engine.stop()
    await _gone([rank.pid for rank in (*before, *after)])


async def test_the_only_rank_is_found_and_replaced_when_it_freezes(checkpoint: Path) -> None:
    failures: list[str] = []
    observer = Silence()
    observer.rank_failed = failures.append  # type: ignore[method-assign]
    engine = await launch(config(checkpoint, 1), observer=observer)
    try:
        progress: dict[str, int] = {}
        running = asyncio.ensure_future(streams(engine, progress))
        await _until(lambda: progress and min(progress.values()) >= 5)
        began = monotonic()
        frozen = engine.ranks()[-1].pid
        os.kill(frozen, signal.SIGSTOP)
        await _until(lambda: failures == ["frozen"], seconds=60)
        print(f"found after {monotonic() - began:.2f} s")
        await _until(lambda: engine.stats().recoveries == 1 and engine.ready, seconds=60)
        print(f"serving again after {monotonic() - began:.2f} s")
        assert len(set(await running)) > len(PROMPTS)
    finally:
        await engine.stop()
    await _gone([frozen])


async def test_a_death_while_idle_is_mended_before_anybody_asks(checkpoint: Path) -> None:
    engine = await launch(config(checkpoint, 1))
    try:
        os.kill(engine.ranks()[0].pid, signal.SIGKILL)
        await _until(lambda: engine.stats().recoveries == 1 and engine.ready, seconds=60)
        assert await answer(engine, "r", "the router", temperature=0.0)
    finally:
        await engine.stop()


async def test_a_rank_that_dies_while_the_group_starts_is_started_again() -> None:
    demo = resolve(load({"parallel": {"tensor": 2}}), Machine(cores=2, gpus=0)).engine
    placement = even_placement(4, 8, 2)
    group = RayGroup(demo, placement, 2048, on_loss=lambda *_: None)
    try:
        starting = asyncio.ensure_future(asyncio.to_thread(group.start))
        await _until(lambda: any(rank.pid for rank in group.ranks()), seconds=60)
        victim = max(rank.pid for rank in group.ranks())
        os.kill(victim, signal.SIGKILL)
        assert await starting > 0
        assert {rank.state for rank in group.ranks()} == {"ready"}
        assert victim not in {rank.pid for rank in group.ranks()}
    finally:
        await asyncio.to_thread(group.stop)


async def test_a_checkpoint_that_cannot_be_read_is_named(checkpoint: Path, tmp_path: Path) -> None:
    broken = write_checkpoint(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        await launch(config(broken, 2))


async def _gone(pids: list[int]) -> None:
    await _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


async def _until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.01)
