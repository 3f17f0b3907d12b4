"""What answers in OpenAI's two generation APIs have in common. Pure: dictionaries, no I/O.

An answer without a stream is its own stream put together, so the two cannot differ:

    event ──Choice.add──▶ the choices of chunks ──▶ sent one by one, or merged by Reply.whole

A Choice is one answer to one prompt and has its state; a Reply is what all chunks of one HTTP answer share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.messages import Routing, TokenEvent
from deployments.logprobs import prompt_logprobs
from deployments.serving import Tokenizer

Json = dict[str, Any]

# What belongs to the whole answer in chat, though its choices bring it.
OF_THE_ANSWER = ("prompt_token_ids", "prompt_logprobs")


class Choice(Protocol):
    def opening(self) -> list[Json]:
        """What comes before the first token."""

    def add(self, event: TokenEvent) -> list[Json]:
        """What carries the event, each in a chunk of its own. Empty where there is nothing to show yet."""


class Reply(Protocol):
    @property
    def id(self) -> str: ...

    def choice(self, index: int, prompt_ids: Sequence[int]) -> Choice: ...

    def chunk(self, choices: list[Json]) -> Json: ...

    def whole(self, parts: Sequence[Sequence[Json]]) -> Json:
        """The answer that the parts of each choice make together."""


@dataclass(frozen=True, slots=True)
class Frame:
    id: str
    model: str
    created: int
    fingerprint: str

    def around(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True)
class Shown:
    """What of an event the caller wants to see beside its text."""

    logprobs: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False
    echo: bool = False
    special_tokens: bool = False
    routing: bool = False

    def extras(self, event: TokenEvent, prompt_ids: Sequence[int], tokenizer: Tokenizer, *, first: bool) -> Json:
        extras: Json = {}
        if event.stop_reason is not None:
            extras["stop_reason"] = event.stop_reason
        if self.token_ids:
            extras["token_ids"] = list(event.token_ids)
            if first:
                extras["prompt_token_ids"] = list(prompt_ids)
        if self.routing:
            extras["routing"] = [_by_layer(routing) for routing in event.routing]
        if first and self.prompt_logprobs and event.prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs(event.prompt_logprobs, tokenizer)
        return extras


def merged_extras(parts: Sequence[Json]) -> Json:
    """What choices of both APIs have: the index, how it ended, and the extras that came with some part."""
    merged: Json = {"index": parts[0]["index"], "finish_reason": parts[-1]["finish_reason"]}
    for name in ("stop_reason", *OF_THE_ANSWER):
        values = [part[name] for part in parts if name in part]
        merged |= {name: values[0]} if values else {}
    for name in ("token_ids", "routing"):  # one for each token
        if any(name in part for part in parts):
            merged[name] = [one for part in parts for one in part.get(name, [])]
    return merged


def _by_layer(routing: Routing) -> list[list[Json]]:
    """Of one token."""
    return [[{"expert": expert, "weight": round(weight, 4)} for expert, weight in chosen] for chosen in routing]
