"""An engine that follows a script, and HTTP clients around it: the API is tested without a model in milliseconds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from cluster.config import EngineConfig, SchedulerConfig
from cluster.errors import EngineError
from cluster.messages import (
    EncodeRequest,
    EngineStats,
    ExpertsStatus,
    FinishReason,
    Grammar,
    RankStatus,
    Request,
    Routing,
    TokenEvent,
    TokenLogprob,
)
from cluster.placement import even_placement
from cluster.rebalancing import Rebalancing
from deployments.api import create_app
from deployments.live import Live
from deployments.resolve import Resolved
from deployments.serving import Task
from deployments.settings import Settings, load
from model.errors import TokenizerError

Script = Callable[[Request], AsyncIterator[TokenEvent]]
Rows = Callable[[EncodeRequest], Awaitable[list[list[float]]]]

MODEL = "fake"
WORDS = ("one", " two", " three")


class FakeTokenizer:
    """One token per character; its id is the code point. 1 begins, 2 ends."""

    vocab_size = 1000

    def __init__(self, *, knows_tools: bool = True) -> None:
        self.knows_tools = knows_tools

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids if token > 2)

    def incremental(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> FakeDecoder:
        return FakeDecoder()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        if messages[-1]["role"] == "assistant":
            raise TokenizerError("the last message must be the user's")
        text = "".join(f"<{message['role']}>{_shown(message)}" for message in messages)
        if tools and self.knows_tools:
            text = f"<tools>{json.dumps(tools)}{text}"
        return self.encode(text + "<assistant>" * add_generation_prompt)


def _shown(message: Mapping[str, Any]) -> str:
    extras = {name: value for name, value in message.items() if name not in ("role", "content")}
    return message["content"] + (json.dumps(extras) if extras else "")


class FakeDecoder:
    def push(self, ids: Sequence[int]) -> str:
        return FakeTokenizer().decode(ids)

    def flush(self) -> str:
        return ""


def spelling(*texts: str, finish_reason: FinishReason = "stop") -> Script:
    """Every choice says one of the texts, a token for each character, with log-probabilities where they are wanted."""

    async def script(request: Request) -> AsyncIterator[TokenEvent]:
        for position in range(max(map(len, texts)) + 1):
            for choice in range(request.n):
                text = texts[choice % len(texts)]
                if position <= len(text):
                    await asyncio.sleep(0)
                    yield _spelt(request, choice, text, position, finish_reason)

    return script


def _spelt(request: Request, choice: int, text: str, position: int, finish_reason: FinishReason) -> TokenEvent:
    """The event of one character; behind the last one the end of sequence."""
    sampling, first = request.sampling, position == 0
    token, shown = (ord(text[position]), text[position]) if position < len(text) else (2, "")
    echo = FakeTokenizer().decode(request.prompt_ids) if request.echo and first else ""
    prompt_logprobs = None
    if first and choice == 0 and sampling.prompt_logprobs is not None:
        known = [_logprob(one, sampling.prompt_logprobs) for one in request.prompt_ids[1:]]
        prompt_logprobs = (None, *known)
    return TokenEvent(
        request.request_id,
        (token,),
        choice,
        text=echo + shown,
        finish_reason=finish_reason if token == 2 else None,
        logprobs=() if sampling.logprobs is None else (_logprob(token, sampling.logprobs),),
        prompt_logprobs=prompt_logprobs,
        routing=((routing_of(token),) if sampling.return_routing else ()),
    )


def routing_of(token: int) -> Routing:
    """Two layers, two experts of four each."""
    return tuple((((token + layer) % 4, 0.75), ((token + layer + 1) % 4, 0.25)) for layer in range(2))


def _logprob(token: int, top: int) -> TokenLogprob:
    """Twice as likely as the next one, which is half as likely again, ..."""
    return TokenLogprob(token, -0.5, 1, tuple((token + step, -0.5 * (step + 1)) for step in range(top)))


async def words(request: Request) -> AsyncIterator[TokenEvent]:
    """Three tokens, then a stop."""
    for number, word in enumerate(WORDS):
        await asyncio.sleep(0)
        yield TokenEvent(request.request_id, (10 + number,), text=word, cached_tokens=0 if number else 1)
    yield TokenEvent(request.request_id, (), finish_reason="stop")


async def one_then_silence(request: Request) -> AsyncIterator[TokenEvent]:
    yield TokenEvent(request.request_id, (10,), text="one")
    await asyncio.Event().wait()


async def silence(request: Request) -> AsyncIterator[TokenEvent]:
    await asyncio.Event().wait()
    yield TokenEvent(request.request_id, ())


def failing(error: Exception, after: int = 0) -> Script:
    """`after` tokens, then the exception."""

    async def script(request: Request) -> AsyncIterator[TokenEvent]:
        for number in range(after):
            yield TokenEvent(request.request_id, (10 + number,), text=WORDS[number])
        raise error

    return script


async def states(request: EncodeRequest) -> list[list[float]]:
    """Two numbers for each token, or those of the last one."""
    rows = [[3.0 * token, 4.0 * token] for token in request.token_ids]
    return rows if request.pooling == "all" else rows[-1:]


class FakeEngine:
    """Satisfies deployments/serving.py and remembers what it was asked."""

    def __init__(
        self,
        script: Script = words,
        max_model_len: int = 100,
        *,
        task: Task = "generate",
        labels: tuple[str, ...] = (),
        rows: Rows = states,
        knows_tools: bool = True,
    ) -> None:
        self.tokenizer = FakeTokenizer(knows_tools=knows_tools)
        self.max_model_len = max_model_len
        self.task: Task = task
        self.labels = labels
        self.rows = rows
        self.encoded: list[EncodeRequest] = []
        self.script = script
        self.healthy = True
        self.ready = True
        self.requests: list[Request] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.refuse: Callable[[Grammar], None] = lambda grammar: None  # raises where a grammar cannot be
        self.limits: SchedulerConfig | None = None
        self.stopped = False
        self.recovering = False
        self.unproved: list[str] = []
        self.moves_refused: EngineError | None = None

    async def generate(self, request: Request) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        try:
            async for event in self.script(request):
                yield replace(event, request_id=request.request_id)
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request.request_id)
            raise
        self.finished.append(request.request_id)

    async def prepare(self, grammar: Grammar, *, opens_text: bool) -> None:
        self.refuse(grammar)

    async def encode(self, request: EncodeRequest) -> list[list[float]]:
        self.encoded.append(request)
        try:
            return await self.rows(request)
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise

    def stats(self) -> EngineStats:
        return EngineStats(1, 2, 30, 4, steps=5, prompt_tokens=6, generated_tokens=7, preemptions=0)

    def experts(self) -> ExpertsStatus:
        return ExpertsStatus(3, 1, ranks=(((0,), (0, 1)),), load=((0.25, 0.75),), imbalance=(1.25,))

    def doubts(self) -> list[str]:
        return self.unproved

    async def rebalance(self) -> Rebalancing:
        if self.moves_refused is not None:
            raise self.moves_refused
        return Rebalancing(replace(even_placement(1, 2, 2), number=4), 1, (1.5,), (1.0,))

    def limit(self, limits: SchedulerConfig) -> None:
        self.limits = limits

    def ranks(self) -> tuple[RankStatus, ...]:
        state = "ready" if self.ready else "dead"
        return (RankStatus(0, 4711, "node", "cpu", state, 0.5),)

    def drain(self) -> None:
        self.ready = False

    async def stop(self) -> None:
        self.stopped = True


def resolved(settings: Settings) -> Resolved:
    settings = settings.model_copy(update={"served_model_name": [MODEL, "other/alias"]})
    return Resolved(settings, EngineConfig(str(Path("fake"))), fingerprint="fp_fake")


def app_for(
    engine: FakeEngine,
    args: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    keep_alive_s: float = 10.0,
) -> Any:
    settings = load(args or {})
    live = Live(settings, environment or {})
    return create_app(engine, resolved(settings), live, replica="replica-1", keep_alive_s=keep_alive_s)


def http(engine: FakeEngine, args: Mapping[str, Any] | None = None, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_for(engine, args, **options), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def openai(engine: FakeEngine, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http(engine, **options), max_retries=0)
