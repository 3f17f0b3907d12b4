"""Answers of /v1/chat/completions, tool calls among them. Pure: dictionaries, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.messages import TokenEvent
from deployments.logprobs import chat_logprobs
from deployments.replies import OF_THE_ANSWER, Choice, Frame, Json, Shown, merged_extras
from deployments.serving import Tokenizer
from deployments.tool_parser import Pieces, ToolCallParser


@dataclass(frozen=True, slots=True)
class CallsWanted:
    """How to look for tool calls in an answer."""

    marker_in_prompt: bool
    max_calls: int | None
    forced_by_name: bool


class ChatChoice:
    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        shown: Shown,
        tokenizer: Tokenizer,
        calls: CallsWanted | None,
    ) -> None:
        self._index = index
        self._prompt_ids = prompt_ids
        self._shown = shown
        self._tokenizer = tokenizer
        self._parser = (
            None if calls is None else ToolCallParser(in_calls=calls.marker_in_prompt, max_calls=calls.max_calls)
        )
        self._forced_by_name = calls is not None and calls.forced_by_name
        self._first = True

    def opening(self) -> list[Json]:
        return [self._part({"role": "assistant", "content": ""})]

    def add(self, event: TokenEvent) -> list[Json]:
        """Text and finish_reason never share a chunk; calls have chunks of their own as well."""
        first, self._first = self._first, False
        pieces = self._pieces(event)
        parts = [self._part({"content": pieces.content})] if pieces.content else []
        parts += [self._part({"tool_calls": [call]}) for call in pieces.calls]
        if event.finish_reason is not None:
            parts.append(self._part({}, self._finish_reason(event.finish_reason)))
        extras = self._shown.extras(event, self._prompt_ids, self._tokenizer, first=first)
        if self._shown.logprobs and event.logprobs:
            extras["logprobs"] = chat_logprobs(event.logprobs, self._tokenizer)
        if extras and not parts:
            parts = [self._part({})]
        if "stop_reason" in extras:  # with the chunk that says it stopped
            parts[-1]["stop_reason"] = extras.pop("stop_reason")
        if parts:
            parts[0] |= extras
        return parts

    def _pieces(self, event: TokenEvent) -> Pieces:
        if self._parser is None:
            return Pieces(event.text)
        return self._parser.push(event.text, last=event.finish_reason is not None)

    def _finish_reason(self, reason: str) -> str:
        """OpenAI's: a call that the caller had forced by name is no reason of its own."""
        called = self._parser is not None and self._parser.num_calls > 0
        return "tool_calls" if called and reason == "stop" and not self._forced_by_name else reason

    def _part(self, delta: Json, finish_reason: str | None = None) -> Json:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


@dataclass(frozen=True, slots=True)
class ChatReply:
    frame: Frame
    shown: Shown
    tokenizer: Tokenizer
    calls: CallsWanted | None = None

    @property
    def id(self) -> str:
        return self.frame.id

    def choice(self, index: int, prompt_ids: Sequence[int]) -> Choice:
        return ChatChoice(index, prompt_ids, self.shown, self.tokenizer, self.calls)

    def chunk(self, choices: list[Json]) -> Json:
        return self._lifted(self.frame.around("chat.completion.chunk", choices))

    def whole(self, parts: Sequence[Sequence[Json]]) -> Json:
        return self._lifted(self.frame.around("chat.completion", [self._merged(choice) for choice in parts]))

    @staticmethod
    def _merged(parts: Sequence[Json]) -> Json:
        texts: list[str] = []
        calls: list[Json] = []
        logprobs: list[Json] = []
        for part in parts:
            texts.append(part["delta"].get("content", ""))
            for delta in part["delta"].get("tool_calls", []):
                if "id" in delta:
                    calls.append({name: delta[name] for name in ("id", "type", "function")})
                else:
                    calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
            logprobs += part["logprobs"]["content"] if part["logprobs"] is not None else []
        content = "".join(texts)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return merged_extras(parts) | {
            "message": message,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        }

    @staticmethod
    def _lifted(answer: Json) -> Json:
        for choice in answer["choices"]:
            for name in OF_THE_ANSWER:
                if name in choice:
                    answer[name] = choice.pop(name)
        return answer
