"""Sixteen streams at once, of every kind that has a state to lose: greedy, seeded, several choices, stop texts,
log-probabilities, JSON schemas. What comes back can be compared between runs, token by token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPTS = (
    "The router looks at every token and",
    "Once upon a time a small fox",
    "What is a mixture of experts? It is",
    "Pages of keys and values",
    "When a worker dies,",
    "Two and three are",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "number"}},
    },
    "required": ["name", "sizes"],
}
TOKENS = 32


@dataclass(eq=False)
class Answer:
    """One stream, put together. Equal answers have the same tokens in the same order."""

    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: list[Any] = field(default_factory=list)
    usage: Any = None

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Answer)
        said = [(a.texts, a.tokens, a.reasons, a.usage) for a in (self, other)]
        return said[0] == said[1] and _close(self.logprobs, other.logprobs)

    def take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            index = choice["index"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self.texts[index] = self.texts.get(index, "") + text
            self.tokens.setdefault(index, []).extend(choice.get("token_ids") or [])
            if choice.get("logprobs"):
                self.logprobs.append(choice["logprobs"])
            if choice["finish_reason"] is not None:
                assert index not in self.reasons, "a choice ends once"
                self.reasons[index] = choice["finish_reason"]
        if chunk.get("usage"):
            self.usage = {name: chunk["usage"][name] for name in ("prompt_tokens", "completion_tokens")}


def bodies(tokens: int = TOKENS) -> list[tuple[str, dict[str, Any]]]:
    """Path and body of each stream."""
    common = {"model": "mixtral-demo", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": tokens}
    common |= {"return_token_ids": True}
    plain = common | {"ignore_eos": True}
    greedy = [plain | {"prompt": prompt, "temperature": 0} for prompt in PROMPTS]
    greedy[0] |= {"logprobs": 2}
    greedy[1] |= {"stop": ["zzz"], "presence_penalty": 0.5}
    seeded = [plain | {"prompt": prompt, "temperature": 0.9, "seed": n} for n, prompt in enumerate(PROMPTS)]
    seeded[0] |= {"n": 2}
    seeded[1] |= {"top_p": 0.8, "priority": 1}
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    shaped = [
        common
        | {"messages": [{"role": "user", "content": prompt}], "temperature": 0.8, "seed": n, "response_format": schema}
        for n, prompt in enumerate(PROMPTS[:4])
    ]
    completions = [("/v1/completions", body) for body in greedy + seeded]
    return completions + [("/v1/chat/completions", body) for body in shaped]


class Run:
    """Streams under way."""

    def __init__(self, url: str, wanted: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self.answers = [Answer() for _ in wanted]
        self.errors: list[str] = []
        self._url = url
        self._wanted = wanted
        self._task = asyncio.ensure_future(self._all())

    async def under_way(self, tokens: int = 4) -> None:
        """Until every stream has so many tokens, or has ended."""
        while not all(a.reasons or sum(map(len, a.tokens.values())) >= tokens for a in self.answers):
            assert not self._task.done(), self._task.result()
            await asyncio.sleep(0.005)

    async def done(self) -> list[Answer]:
        """All of them; no client has seen an error."""
        await self._task
        assert self.errors == []
        return self.answers

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as client:
            streams = zip(self._wanted, self.answers, strict=True)
            await asyncio.gather(*(self._one(client, path, body, answer) for (path, body), answer in streams))

    async def _one(self, client: httpx.AsyncClient, path: str, body: dict[str, Any], answer: Answer) -> None:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                self.errors.append((await response.aread()).decode())
                return
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        self.errors.append(line)
                    else:
                        answer.take(chunk)


def _close(one: Any, other: Any) -> bool:
    """Equal, numbers to within float32's noise: batches of other sizes add in another order."""
    match one, other:
        case float(), float():
            return abs(one - other) < 1e-3
        case list(), list():
            return len(one) == len(other) and all(map(_close, one, other))
        case dict(), dict():
            return one.keys() == other.keys() and all(_close(one[name], other[name]) for name in one)
        case _:
            return bool(one == other)
