"""How answers look in OpenAI's two generation APIs, whole and in chunks. Pure: dictionaries, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.messages import TokenEvent
from deployments.answers import Answer

Json = dict[str, Any]


class Reply(Protocol):
    """What the chunks of one HTTP answer share, and how each is made. `choices` are OpenAI's, one per prompt."""

    @property
    def id(self) -> str: ...

    def chunk(self, choices: list[Json]) -> Json: ...

    def opening(self, index: int) -> list[Json]:
        """Choices that come before the first token."""

    def choices(self, index: int, event: TokenEvent) -> list[Json]:
        """Choices that carry the event, each in a chunk of its own. Empty where there is nothing to show yet."""

    def whole(self, answers: Sequence[Answer], usage: Json) -> Json: ...


@dataclass(frozen=True, slots=True)
class CompletionReply:
    id: str
    model: str
    created: int

    def chunk(self, choices: list[Json]) -> Json:
        return _frame(self.id, "text_completion", self.created, self.model, choices)

    def opening(self, index: int) -> list[Json]:
        return []

    def choices(self, index: int, event: TokenEvent) -> list[Json]:
        if not event.text and event.finish_reason is None:
            return []
        return [self._choice(index, event.text, event.finish_reason)]

    def whole(self, answers: Sequence[Answer], usage: Json) -> Json:
        choices = [self._choice(index, answer.text, answer.finish_reason) for index, answer in enumerate(answers)]
        return self.chunk(choices) | {"usage": usage}

    @staticmethod
    def _choice(index: int, text: str, finish_reason: str | None) -> Json:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}


@dataclass(frozen=True, slots=True)
class ChatReply:
    id: str
    model: str
    created: int

    def chunk(self, choices: list[Json]) -> Json:
        return _frame(self.id, "chat.completion.chunk", self.created, self.model, choices)

    def opening(self, index: int) -> list[Json]:
        return [self._choice(index, {"role": "assistant", "content": ""}, None)]

    def choices(self, index: int, event: TokenEvent) -> list[Json]:
        """Text and finish_reason never share a chunk."""
        choices = [self._choice(index, {"content": event.text}, None)] if event.text else []
        if event.finish_reason is not None:
            choices.append(self._choice(index, {}, event.finish_reason))
        return choices

    def whole(self, answers: Sequence[Answer], usage: Json) -> Json:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return _frame(self.id, "chat.completion", self.created, self.model, choices) | {"usage": usage}

    @staticmethod
    def _choice(index: int, delta: Json, finish_reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> Json:
    completion_tokens = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in answers)},
    }


def _frame(identity: str, kind: str, created: int, model: str, choices: list[Json]) -> Json:
    return {"id": identity, "object": kind, "created": created, "model": model, "choices": choices}
