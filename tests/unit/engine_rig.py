"""An engine over a fake group, and what its answers must be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from cluster.config import EngineConfig, KVConfig, ParallelConfig, SchedulerConfig
from cluster.engine import Engine
from cluster.messages import Request, SamplingParams, TokenEvent
from cluster.observer import Observer
from cluster.placement import even_placement
from model.config import MixtralConfig
from tests.fake_group import FakeGroup, next_token
from tests.tiny import CONFIG

EOS = 2


class LetterTokenizer:
    """Token n is the nth letter after 'A'."""

    eos_ids = (EOS,)

    def __init__(self) -> None:
        self.decoded_after: list[tuple[int, ...]] = []

    def incremental(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True, opens_message: bool = False
    ) -> LetterTokenizer:
        assert opens_message is not bool(prompt_ids)
        self.decoded_after.append(tuple(prompt_ids))
        return self

    def decode(self, ids: Sequence[int]) -> str:
        return self.push(ids)

    def push(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("A") + i) for i in ids)

    def flush(self) -> str:
        return ""


@asynccontextmanager
async def running_engine(
    group: FakeGroup | None = None,
    scheduler: SchedulerConfig | None = None,
    parallel: ParallelConfig | None = None,
    observer: Observer | None = None,
) -> AsyncIterator[Engine]:
    group = group or FakeGroup(64, 4)
    config = EngineConfig(
        "fake",
        parallel=parallel or ParallelConfig(),
        kv=KVConfig(page_size=4),
        scheduler=scheduler or SchedulerConfig(8, 16, 8),
    )
    model = MixtralConfig.from_dict(CONFIG, "tiny")
    placement = even_placement(2, 4, config.parallel.ranks, spare_slots=1)
    engine = Engine(config, model, group, placement, group.start(), 128, LetterTokenizer(), observer)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        await engine.stop()
        assert group.stopped
        assert engine.stats().pages_used == 0


def request(request_id: str = "r", prompt: tuple[int, ...] = (5, 6), **fields: object) -> Request:
    own = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__slots__}
    params: dict[str, object] = {"max_tokens": 8, "seed": 0, "ignore_eos": True, **own}
    return Request(request_id, prompt, SamplingParams(**params), **fields)  # type: ignore[arg-type]


async def collect(engine: Engine, wanted: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(wanted)]


def alone(prompt: tuple[int, ...], count: int, seed: int = 0) -> list[int]:
    tokens = list(prompt)
    for index in range(count):
        tokens.append(next_token(tokens, seed, index))
    return tokens[len(prompt) :]


def text_of(tokens: list[int]) -> str:
    return LetterTokenizer().push(tokens)


async def settled(engine: Engine) -> None:
    """Wait until nothing runs: an abort takes effect at the next step."""
    await until(lambda: engine.stats().running == engine.stats().waiting == 0)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come true")
