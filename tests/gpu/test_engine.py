"""An engine on a GPU, whose decode steps are graphs: the demo model answers as on a CPU, also after a recovery."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentencepiece", reason="an engine needs it")
pytest.importorskip("jinja2", reason="an engine needs it")

import model.demo
from cluster.config import Device, EngineConfig, KVConfig, SchedulerConfig
from cluster.engine import Engine
from cluster.launch import launch_in_process
from cluster.messages import Request, SamplingParams
from tests.notes import Notes

DEMO = Path(str(model.demo.__file__)).parent
QUESTIONS = (
    "What is a mixture of experts?",
    "Who are you?",
    "What is 12 plus 30?",
    "What does a router do?",
    "Tell me",
)
TOKENS = 24
WAIT_S = 60


def config(device: Device) -> EngineConfig:
    scheduler = SchedulerConfig(max_running=8, max_step_tokens=256)
    return EngineConfig(str(DEMO), device=device, kv=KVConfig(memory=64 << 20), scheduler=scheduler)


async def answers(engine: Engine) -> list[tuple[int, ...]]:
    async def answer(question: str) -> tuple[int, ...]:
        sampling = SamplingParams(TOKENS, temperature=0.0, seed=0)
        ids = tuple(engine.tokenizer.chat_prompt([{"role": "user", "content": question}]))
        events = [event async for event in engine.generate(Request(question, ids, sampling))]
        return tuple(token for event in events for token in event.token_ids)

    return await asyncio.gather(*map(answer, QUESTIONS))


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(WAIT_S * 100):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true")


async def on_a_cpu() -> list[tuple[int, ...]]:
    engine = await launch_in_process(config("cpu"))
    try:
        return await answers(engine)
    finally:
        await engine.stop()


async def on_a_gpu(expected: list[tuple[int, ...]], device: torch.device) -> None:
    notes = Notes()
    engine = await launch_in_process(config("cuda"), notes)

    async def answer_by_graphs() -> int:
        """Memory that is in use afterwards."""
        before = len(notes.steps)
        assert await answers(engine) == expected
        replayed = [step.graph for step in notes.steps[before:] if not step.prompt_tokens]
        assert replayed
        assert all(replayed)
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)

    try:
        await answer_by_graphs()
        used = set()
        for recovery in range(3):
            engine.rank_lost("nothing was lost", recovery)
            await until(lambda done=recovery: engine.stats().recoveries > done)  # type: ignore[misc]
            await until(lambda: engine._loop._graphs.complete and not engine.recovering)
            used.add(await answer_by_graphs())
        assert len(used) == 1, "graphs that were captured anew take what those before took"
    finally:
        await engine.stop()


def test_answers_by_graphs_are_those_of_a_cpu(device: torch.device) -> None:
    asyncio.run(on_a_gpu(asyncio.run(on_a_cpu()), device))
