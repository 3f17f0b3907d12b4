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
from cluster.errors import EngineNotReady
from cluster.launch import launch, launch_in_process
from cluster.messages import Request, SamplingParams
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


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_killed_rank_is_known_at_once_and_every_stream_gets_an_answer(checkpoint: Path, victim: int) -> None:
    engine = await launch(config(checkpoint, 2))
    try:
        long = SamplingParams(max_tokens=400, ignore_eos=True)
        streams = [engine.generate(Request(f"r{n}", (5, 6, 7), long)) for n in range(3)]
        for stream in streams:
            await anext(stream)
        began = monotonic()
        os.kill(engine.ranks()[victim].pid, signal.SIGKILL)
        for stream in streams:
            last = [event async for event in stream][-1]
            assert last.finish_reason == "error"
            assert last.error is not None
            assert "died" in last.error
        print(f"rank {victim} killed: every stream had its answer {monotonic() - began:.3f} s later")
        assert not engine.healthy
        await _until(lambda: engine.ranks()[victim].state == "dead")
        with pytest.raises(EngineNotReady):
            await anext(engine.generate(Request("late", (5,), SamplingParams(max_tokens=1))))
    finally:
        await engine.stop()


async def test_an_idle_engine_notices_a_death(checkpoint: Path) -> None:
    engine = await launch(config(checkpoint, 1))
    try:
        os.kill(engine.ranks()[0].pid, signal.SIGKILL)
        await _until(lambda: not engine.healthy)
    finally:
        await engine.stop()


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
