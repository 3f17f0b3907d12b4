"""The engine over a real model in this process: however the work is cut up, the answer is the same."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import EngineConfig, KVConfig, SchedulerConfig
from cluster.engine import Engine
from cluster.launch import launch_in_process
from cluster.messages import EncodeRequest, Grammar, Request, SamplingParams, TokenEvent
from tests.tiny import write_checkpoint

LONG = tuple(range(20, 60))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("relations") / "tiny")


def config(checkpoint: Path, *, pages: int = 64, caching: bool = True, **scheduler: int) -> EngineConfig:
    page_bytes = 2 * 2 * 4 * 2 * 16 * 4  # layers, K and V, slots, heads, head_dim, bytes
    return EngineConfig(
        str(checkpoint),
        kv=KVConfig(page_size=4, memory=pages * page_bytes, prefix_caching=caching),
        scheduler=SchedulerConfig(**{"max_running": 8, "max_step_tokens": 64, **scheduler}),
    )


def request(name: str, prompt: tuple[int, ...] = LONG, n: int = 1, **sampling: object) -> Request:
    params = {"max_tokens": 12, "temperature": 0.9, "seed": 7, "ignore_eos": True, **sampling}
    return Request(name, prompt, SamplingParams(**params), n=n)  # type: ignore[arg-type]


async def answer(engine: Engine, wanted: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(wanted)]


async def tokens(engine: Engine, *wanted: Request) -> list[list[int]]:
    """Of each request, all at once; of several choices, one after another."""
    answers = await asyncio.gather(*(answer(engine, one) for one in wanted))
    return [
        [t for choice in range(one.n) for e in events if e.choice == choice for t in e.token_ids]
        for one, events in zip(wanted, answers, strict=True)
    ]


REQUESTS = [
    request("greedy", temperature=0.0),
    request("seeded"),
    request("penalties", repetition_penalty=1.4, frequency_penalty=0.3, min_tokens=4),
    request("filtered", LONG[:9], top_k=20, top_p=0.9, min_p=0.01),
    request("choices", LONG[:17], n=3),
    request("grammar", LONG[:5], grammar=Grammar("regex", "[a-z ]{3,30}"), ignore_eos=False),
]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    """What each gets from an engine that has nothing else to do."""

    async def one_by_one() -> list[list[int]]:
        engine = await launch_in_process(config(checkpoint, caching=False))
        try:
            return [(await tokens(engine, one))[0] for one in REQUESTS]
        finally:
            await engine.stop()

    return asyncio.run(one_by_one())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("all at once", {}),
        ("chunks of five", {"max_step_tokens": 5}),
        ("two at a time", {"max_running": 2}),
        ("memory for little more than one", {"pages": 20}),
        ("without a prefix cache", {"caching": False}),
    ],
)
async def test_however_it_is_scheduled_everyone_gets_what_they_get_alone(
    name: str, changes: dict[str, int], checkpoint: Path, alone: list[list[int]]
) -> None:
    engine = await launch_in_process(config(checkpoint, **changes))  # type: ignore[arg-type]
    try:
        assert await tokens(engine, *REQUESTS) == alone
        again = [replace(one, request_id=one.request_id + " again") for one in REQUESTS]
        assert await tokens(engine, *again) == alone, "now with what the first ones left in the cache"
        stats = engine.stats()
        assert stats.pages_used == 0
        if name == "memory for little more than one":
            assert stats.preemptions > 0
    finally:
        await engine.stop()


async def test_a_json_schema_is_kept_to(checkpoint: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    engine = await launch_in_process(config(checkpoint))
    try:
        wanted = request("r", max_tokens=60, grammar=Grammar("json_schema", json.dumps(schema)), ignore_eos=False)
        events = await answer(engine, replace(wanted, continues_prompt=False))
        document = json.loads("".join(event.text for event in events))
        assert isinstance(document["n"], int)
        assert events[-1].finish_reason == "stop"
    finally:
        await engine.stop()


async def test_log_probabilities_do_not_depend_on_the_cache(checkpoint: Path) -> None:
    engine = await launch_in_process(config(checkpoint, max_step_tokens=16))
    try:
        await tokens(engine, request("warm"))
        events = await answer(engine, request("judged", logprobs=3, prompt_logprobs=2))
        assert events[0].prompt_logprobs is not None
        assert [p and p.token_id for p in events[0].prompt_logprobs] == [None, *LONG[1:]]
        assert all(len(e.logprobs) == len(e.token_ids) == 1 and len(e.logprobs[0].top) == 3 for e in events)
    finally:
        await engine.stop()


async def test_encoding_beside_generating(checkpoint: Path) -> None:
    engine = await launch_in_process(config(checkpoint, max_step_tokens=7))
    try:
        whole, mean, last, _ = await asyncio.gather(
            *(engine.encode(EncodeRequest(pooling, LONG, pooling)) for pooling in ("all", "mean", "last")),  # type: ignore[arg-type]
            tokens(engine, request("r")),
        )
        assert len(whole) == len(LONG)
        assert last[0] == pytest.approx(whole[-1], abs=1e-4)
        column = [row[0] for row in whole]
        assert abs(mean[0][0] - sum(column) / len(column)) < 1e-4
    finally:
        await engine.stop()
