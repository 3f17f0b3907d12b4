"""An engine as on a GPU, with Triton's interpreter and captures that compute again: its answers are those of a CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

import cluster.engine
import cluster.held_experts
import model.mixtral
from cluster.config import EngineConfig, KVConfig, SchedulerConfig
from cluster.graph_ladder import GraphLadder
from cluster.launch import launch_in_process
from cluster.messages import Request, SamplingParams
from cluster.observer import StepRecord
from model.config import MixtralConfig
from tests.notes import Notes
from tests.recomputed import Recomputed
from tests.tiny import write_checkpoint

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.triton_backend import TritonBackend

TOKENS = 4


async def answers(config: EngineConfig) -> tuple[list[tuple[int, ...]], list[StepRecord]]:
    """Of two requests side by side, one of which wants to know its experts for no longer than it takes."""
    notes = Notes()
    engine = await launch_in_process(config, notes)

    async def answer(number: int) -> tuple[int, ...]:
        sampling = SamplingParams(TOKENS - number, temperature=0.0, seed=0, ignore_eos=True, return_routing=number == 1)
        events = [event async for event in engine.generate(Request(str(number), (5 + number, 9), sampling))]
        return tuple(token for event in events for token in event.token_ids)

    try:
        return await asyncio.gather(answer(0), answer(1)), notes.steps
    finally:
        await engine.stop()


def test_answers_with_graphs_are_those_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}  # the interpreter is slow
    write_checkpoint(tmp_path, **small, max_position_embeddings=16)
    scheduler = SchedulerConfig(max_running=2, max_step_tokens=16)
    config = EngineConfig(str(tmp_path), kv=KVConfig(page_size=4, memory=1 << 16), scheduler=scheduler)
    expected, computed = asyncio.run(answers(config))
    assert {step.graph for step in computed} == {None}

    def backend_for(config: MixtralConfig, device: torch.device, dtype: torch.dtype) -> TritonBackend:
        return TritonBackend(config, device, dtype, Recomputed)

    for where in (model.mixtral, cluster.held_experts):
        monkeypatch.setattr(where, "backend_for", backend_for)
    monkeypatch.setattr(cluster.engine, "ladder_for", lambda _: GraphLadder((2, 1), "none"))
    found, replayed = asyncio.run(answers(config))
    assert found == expected
    graphs = [step.graph for step in replayed]
    assert graphs[0] is False, "prompts are computed"
    assert graphs[-1] is True, "the other has ended, nobody wants to know experts"
