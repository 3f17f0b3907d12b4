"""Layouts of a number of devices, and what a real start says of the same configuration."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.config import EngineConfig, KVConfig, ParallelConfig, SchedulerConfig
from cluster.host_memory import available_bytes
from cluster.launch import launch_in_process
from cluster.layouts import Layout, Workload, estimate, estimates, layouts, recommend
from cluster.step_floor import Hardware
from model.config import MixtralConfig, load_config
from tests.tiny import write_checkpoint

MODEL = MixtralConfig.from_dict({}, "8x7B")
H100 = Hardware("H100", 80 << 30, 3.35e12, 989e12, 450e9)
SIXTEEN_BIT = Workload(4096, 2, lambda height, width: 2 * height * width)
CONFIG = EngineConfig("somewhere", device="cuda", dtype="bfloat16", max_model_len=4096)


@pytest.mark.parametrize("devices", [1, 2, 6, 8])
def test_every_layout_uses_all_devices_and_is_named_once(devices: int) -> None:
    found = list(layouts(MODEL, devices))
    assert all(layout.devices == devices for layout in found)
    assert len(found) == len(set(found))
    assert Layout(devices, ParallelConfig(expert=1)) in found


def test_what_does_not_fit_lacks_bytes() -> None:
    """93 GB of weights and a GPU of 80 GiB."""
    alone = estimate(MODEL, Layout(1, ParallelConfig(expert=1)), H100, CONFIG, SIXTEEN_BIT)
    assert alone.lacks == alone.footprint.weights + alone.footprint.beside + (640 << 20) - H100.memory > 0
    assert not estimate(MODEL, Layout(1, ParallelConfig(tensor=2, expert=2)), H100, CONFIG, SIXTEEN_BIT).lacks


def test_too_little_for_one_sequence_does_not_fit() -> None:
    holds = estimate(MODEL, Layout(1, ParallelConfig(expert=1)), H100, CONFIG, SIXTEEN_BIT).footprint
    barely = Hardware("barely", holds.weights + holds.beside + (700 << 20), 1e12, 1e15, 1e11)
    assert estimate(MODEL, Layout(1, ParallelConfig(expert=1)), barely, CONFIG, SIXTEEN_BIT).lacks > 0


def test_recommendations_are_the_best_of_their_kind() -> None:
    fitting = [each for each in estimates(MODEL, 8, H100, CONFIG, SIXTEEN_BIT) if not each.lacks]
    best = recommend(fitting)
    assert best.latency.one_s <= min(each.one_s for each in fitting) + 1e-5
    assert best.throughput.tokens_per_s == max(each.tokens_per_s for each in fitting)
    assert best.failure.layout.replicas == max(each.layout.replicas for each in fitting)


@pytest.mark.parametrize("memory", [None, 3 << 20])
def test_kv_tokens_are_those_of_a_real_start(tmp_path: Path, memory: int | None) -> None:
    write_checkpoint(tmp_path)
    config = EngineConfig(
        str(tmp_path), max_model_len=512, kv=KVConfig(memory=memory), scheduler=SchedulerConfig(max_running=100_000)
    )
    model = load_config(tmp_path)
    free = available_bytes()
    machine = Hardware("this machine", free, 5e10, 1e12, 1e10)
    workload = Workload(512, 4, lambda height, width: 4 * height * width)
    planned = estimate(model, Layout(1, ParallelConfig(expert=1)), machine, config, workload)

    async def pages() -> int:
        engine = await launch_in_process(config)
        total = engine.stats().pages_total
        await engine.stop()
        return total

    assert planned.kv_tokens == pytest.approx(asyncio.run(pages()) * config.kv.page_size, rel=0.03)
