from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import EngineConfig, KVConfig, SchedulerConfig
from cluster.errors import EngineError
from cluster.memory import CPU_LIMIT, held_at_once, page_budget
from cluster.messages import WorkerFacts

FACTS = WorkerFacts(1, "a", "cpu", 0, 0.0, bytes_per_page=1000, free_bytes=8_000_000)
CONFIG = EngineConfig("model", kv=KVConfig(page_size=16))


def test_the_poorest_rank_decides() -> None:
    poor = replace(FACTS, node="b", free_bytes=400_000)
    assert page_budget(CONFIG, [FACTS, poor], 1024) == 100


def test_ranks_of_one_node_share_its_memory() -> None:
    assert page_budget(CONFIG, [FACTS], 4096) == 2000
    assert page_budget(CONFIG, [FACTS, FACTS], 4096) == 1000


def test_a_cpu_keeps_most_of_its_memory() -> None:
    rich = replace(FACTS, free_bytes=1 << 50, bytes_per_page=1 << 20)
    assert page_budget(CONFIG, [rich], 1 << 20) == CPU_LIMIT >> 20


def test_no_more_pages_than_the_running_requests_could_fill() -> None:
    config = replace(CONFIG, scheduler=SchedulerConfig(max_running=2))
    assert page_budget(config, [FACTS], 100) == 14


def test_a_length_that_was_asked_for_must_fit() -> None:
    config = replace(CONFIG, kv=KVConfig(page_size=16, memory=10_000), max_model_len=320)
    with pytest.raises(
        EngineError, match="holds 160 tokens but a sequence of 320 tokens must fit: each rank lacks 10000"
    ):
        page_budget(config, [FACTS], 320)
    assert page_budget(replace(config, max_model_len=None), [FACTS], 320) == 10


def test_a_sliding_window_bounds_what_a_sequence_holds() -> None:
    config = replace(CONFIG, scheduler=SchedulerConfig(max_step_tokens=100))
    assert held_at_once(config, 4096, None) == 4096
    assert held_at_once(config, 4096, 512) == 712
    assert held_at_once(config, 300, 512) == 300
