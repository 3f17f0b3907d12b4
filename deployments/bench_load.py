"""Load on a running server: so many streams at once, each asking again as soon as it is answered.

    /v1/models, /tokenize ──▶ Target        numbers ──▶ stream, stream, ... ──/v1/completions──▶ Measurements

Prompts are token ids, so that they are as long as they were wanted, and drawn anew for each request, so that the
prefix cache does not answer for the model. Whatever goes wrong with a request is counted, and is no reason to stop.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import aiohttp
from aiohttp.http import HttpProcessingError

from deployments.bench_report import AnswerTimer, Measurements
from deployments.concurrency import together
from deployments.settings import SettingsError

CONNECT_S = 10.0
SILENCE_S = 60.0  # a server that computes says at least ": waiting" every 10 s
AFTER_ERROR_S = 0.5  # a server that refuses everything is not asked ten thousand times a second
# What an answer raises that is not as ours are; the last: a line without end.
NOT_OURS = (ValueError, LookupError, TypeError, OverflowError, RecursionError, HttpProcessingError)
TEXT = (
    "A router looks at every token and sends it to two of eight experts. Pages hold keys and values, ranks hold pages, "
    "and whoever waits for the slowest of them waits for all. When a worker dies in the middle of a long story, others "
    "go on from where it was: nothing is lost, nothing is said twice. How many small words does it take to fill a "
    "prompt? As many as you like, in any order, for nobody reads the answer."
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked. Lengths are drawn evenly from their ranges."""

    streams: int
    prompt_tokens: range
    output_tokens: range
    requests: int | None  # None: until the time is over
    duration_s: float | None  # None: until all requests are answered
    seed: int


@dataclass(frozen=True, slots=True)
class Target:
    session: aiohttp.ClientSession
    model: str
    begin: int  # the token that every prompt begins with
    words: tuple[int, ...]


@asynccontextmanager
async def connected(url: str, key: str | None, model: str | None, workload: Workload) -> AsyncIterator[Target]:
    """The server, once it is seen to be there and to take such requests. Else SettingsError."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(
        url.rstrip("/") + "/",
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),  # its own limit would be what is measured
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S),
    ) as session:
        target, longest = await _look(session, url, model)
        needed = workload.prompt_tokens[-1] + workload.output_tokens[-1]
        if needed > longest:
            raise SettingsError(
                f"prompt and answer come to {needed} tokens and {target.model} takes {longest}; "
                "lower --prompt-tokens or --output-tokens."
            )
        yield target


async def _look(session: aiohttp.ClientSession, url: str, model: str | None) -> tuple[Target, int]:
    """With the most tokens of a prompt and its answer."""
    try:
        models = (await _json(session, "GET", "v1/models"))["data"]
        limits = {one["id"]: int(one["max_model_len"]) for one in models}
        [first, *_] = limits
        name = model or first
        if name not in limits:
            raise SettingsError(f"--model {name}: {url} serves {', '.join(limits)}.")
        tokens = (await _json(session, "POST", "tokenize", {"model": name, "prompt": TEXT}))["tokens"]
        begin, word, *more = map(int, tokens)
    except SettingsError:
        raise
    except (aiohttp.ClientError, OSError) as error:
        raise SettingsError(f"{url} cannot be reached: {_reason(error)}.") from None
    except NOT_OURS:
        raise SettingsError(f"{url} does not answer as mixtral-serve does; is --url that of its root?") from None
    return Target(session, name, begin, (word, *more)), limits[name]


async def put_load(target: Target, workload: Workload, measured: Measurements, stopped: asyncio.Event) -> None:
    """Until all is answered, the time is over, or somebody has stopped it; then what still runs is cut off."""
    numbers = count() if workload.requests is None else iter(range(workload.requests))
    streams = asyncio.create_task(_streams(target, workload, measured, numbers))
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait((streams, stopping), timeout=workload.duration_s, return_when=asyncio.FIRST_COMPLETED)
        if streams.done():
            streams.result()
    finally:
        measured.end()
        streams.cancel()
        stopping.cancel()
        await asyncio.gather(streams, stopping, return_exceptions=True)


async def _streams(target: Target, workload: Workload, measured: Measurements, numbers: Iterator[int]) -> None:
    async def stream() -> None:
        for number in numbers:  # shared: each takes the next one
            error = await _ask(target, _body(target, workload, number), measured)
            if error is not None:
                measured.failed(error)
                await asyncio.sleep(AFTER_ERROR_S)

    await together(stream() for _ in range(workload.streams))


def _body(target: Target, workload: Workload, number: int) -> dict[str, Any]:
    """The same for the same seed and number."""
    chance = random.Random(f"{workload.seed} {number}")  # noqa: S311  a load is no secret
    words = chance.choices(target.words, k=chance.choice(workload.prompt_tokens) - 1)
    return {
        "model": target.model,
        "prompt": [target.begin, *words],
        "max_tokens": chance.choice(workload.output_tokens),
        "ignore_eos": True,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask(target: Target, body: dict[str, Any], measured: Measurements) -> str | None:
    """One request; what went wrong with it, in a few words that many requests share."""
    timer = AnswerTimer(measured, len(body["prompt"]))
    tokens = None
    try:
        async with target.session.post("v1/completions", json=body) as response:
            if response.status != 200:
                return f"{response.status} {_code(await _content(response, 1 << 16))}"
            async for line in response.content:
                if line == b"data: [DONE]\n":
                    break
                if not line.startswith(b"data: "):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    return f"in a stream: {chunk['error']['code']}"
                if chunk["choices"]:
                    timer.text()
                if chunk.get("usage"):
                    tokens = int(chunk["usage"]["completion_tokens"])
            else:
                return "a stream was cut off"
        if tokens is None:
            return "a stream without usage"
        timer.finished(tokens)
    except (aiohttp.ClientError, OSError) as error:
        return type(error).__name__
    except NOT_OURS:
        return "an answer that is none of ours"
    return None


async def _content(response: aiohttp.ClientResponse, most: int) -> bytes:
    """All of it, or the first so many bytes; a single read() gives what has come by then."""
    content = b""
    while len(content) < most and (piece := await response.content.read(most - len(content))):
        content += piece
    return content


def _code(body: bytes) -> str:
    """Of OpenAI's envelope, if it is one."""
    try:
        return str(json.loads(body)["error"]["code"])
    except NOT_OURS:
        return "without a code"


def _reason(error: aiohttp.ClientError | OSError) -> str:
    """aiohttp's own sentences name its classes and flags."""
    number = getattr(error, "errno", None) or 0
    if number > 0:
        return os.strerror(number)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__  # of a name: who looked it up says it


async def _json(session: aiohttp.ClientSession, method: str, path: str, body: Any = None) -> Any:
    async with session.request(method, path, json=body) as response:
        content = await _content(response, 1 << 20)
        if response.status != 200:
            raise SettingsError(f"{response.url} says {response.status} {_code(content)}.")
        return json.loads(content)
