"""An engine that follows a script, and HTTP clients around it: the API is tested without a model in milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from cluster.config import EngineConfig
from cluster.messages import EngineStats, RankStatus, Request, TokenEvent
from deployments.api import create_app
from deployments.auth import Keys
from deployments.resolve import Resolved
from deployments.settings import Settings, load
from model.errors import TokenizerError

Script = Callable[[Request], AsyncIterator[TokenEvent]]

MODEL = "fake"
WORDS = ("one", " two", " three")


class FakeTokenizer:
    """One token per character; its id is the code point. 1 begins, 2 ends."""

    vocab_size = 1000

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids if token > 2)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        if messages[-1]["role"] == "assistant":
            raise TokenizerError("the last message must be the user's")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return self.encode(text + "<assistant>" * add_generation_prompt)


async def words(request: Request) -> AsyncIterator[TokenEvent]:
    """Three tokens, then a stop."""
    for number, word in enumerate(WORDS):
        await asyncio.sleep(0)
        yield TokenEvent(request.request_id, (10 + number,), word, cached_tokens=0 if number else 1)
    yield TokenEvent(request.request_id, (), finish_reason="stop")


async def one_then_silence(request: Request) -> AsyncIterator[TokenEvent]:
    yield TokenEvent(request.request_id, (10,), "one")
    await asyncio.Event().wait()


async def silence(request: Request) -> AsyncIterator[TokenEvent]:
    await asyncio.Event().wait()
    yield TokenEvent(request.request_id, ())


def failing(error: Exception, after: int = 0) -> Script:
    """`after` tokens, then the exception."""

    async def script(request: Request) -> AsyncIterator[TokenEvent]:
        for number in range(after):
            yield TokenEvent(request.request_id, (10 + number,), WORDS[number])
        raise error

    return script


class FakeEngine:
    """Satisfies deployments/serving.py and remembers what it was asked."""

    def __init__(self, script: Script = words, max_model_len: int = 100) -> None:
        self.tokenizer = FakeTokenizer()
        self.max_model_len = max_model_len
        self.script = script
        self.healthy = True
        self.ready = True
        self.requests: list[Request] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.stopped = False

    async def generate(self, request: Request) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        try:
            async for event in self.script(request):
                yield replace(event, request_id=request.request_id)
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request.request_id)
            raise
        self.finished.append(request.request_id)

    def stats(self) -> EngineStats:
        return EngineStats(1, 2, 30, 4, steps=5, prompt_tokens=6, generated_tokens=7, preemptions=0)

    def ranks(self) -> tuple[RankStatus, ...]:
        state = "ready" if self.ready else "dead"
        return (RankStatus(0, 4711, "node", "cpu", state, 0.5),)

    async def stop(self) -> None:
        self.stopped = True


def resolved(settings: Settings) -> Resolved:
    settings = settings.model_copy(update={"served_model_name": [MODEL, "other/alias"]})
    return Resolved(settings, EngineConfig(str(Path("fake"))))


def app_for(
    engine: FakeEngine,
    args: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    keep_alive_s: float = 10.0,
) -> Any:
    settings = load(args or {})
    keys = Keys(settings.auth, environment or {})
    return create_app(engine, resolved(settings), keys, replica="replica-1", keep_alive_s=keep_alive_s)


def http(engine: FakeEngine, args: Mapping[str, Any] | None = None, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_for(engine, args, **options), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def openai(engine: FakeEngine, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http(engine, **options), max_retries=0)
