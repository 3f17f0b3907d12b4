"""Layouts of ranks on real actors: the text of one process, and a rank that cannot load says why."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import save_file

from cluster import worker_group
from cluster.config import EngineConfig, ParallelConfig
from cluster.engine import Engine
from cluster.launch import launch, launch_in_process
from cluster.messages import Request, SamplingParams
from model.errors import CheckpointError
from tests.tiny import CONFIG, weights, write_checkpoint

pytestmark = pytest.mark.usefixtures("local_ray")


async def answers(engine: Engine) -> list[str]:
    """Six at once, greedy and seeded, more than one for each data group."""

    async def answer(number: int) -> str:
        ids = tuple(engine.tokenizer.encode("tokens travel to the rank " * (number + 1)))
        sampling = SamplingParams(16, temperature=0.0 if number % 2 else 0.9, seed=number, ignore_eos=True)
        return "".join([event.text async for event in engine.generate(Request(str(number), ids, sampling))])

    return await asyncio.gather(*(answer(number) for number in range(6)))


async def test_four_ranks_of_every_kind_answer_like_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Data groups of sliced attention, sliced experts, replicas of experts. Other layouts: tests/dist."""
    monkeypatch.setattr(worker_group, "LOADING_NEWS_S", 0.0)
    caplog.set_level(logging.INFO)
    checkpoint = str(write_checkpoint(tmp_path / "tiny"))
    alone = await launch_in_process(EngineConfig(checkpoint))
    expected = await answers(alone)
    await alone.stop()
    assert len(set(expected)) == 6
    parallel = ParallelConfig(2, 2, expert=2, spare_slots=1, exchange="all_to_all", cpus_per_rank=0.25)
    room = placement_group([{"CPU": parallel.cpus_per_rank}] * parallel.ranks, strategy="PACK")
    ray.get(room.ready())
    engine = await launch(EngineConfig(checkpoint, parallel=parallel), room)
    try:
        assert await answers(engine) == expected
        assert len(engine.ranks()) == parallel.ranks
    finally:
        await engine.stop()
        remove_placement_group(room)
    assert re.search(r"loading: rank \d \(pid \d+ on .*\) \d+%", caplog.text)
    assert caplog.text.count("GB/s") == parallel.ranks


async def test_a_rank_that_cannot_load_names_file_and_tensor(tmp_path: Path) -> None:
    """Its sentence is what the replica fails with."""
    broken = write_checkpoint(tmp_path / "broken")
    tensors = weights(CONFIG)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {re.escape(name)} "):
        await launch(EngineConfig(str(broken)))
