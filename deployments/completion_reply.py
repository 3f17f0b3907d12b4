"""Answers of /v1/completions. Pure: dictionaries, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.messages import TokenEvent, TokenLogprob
from deployments.logprobs import CompletionLogprobs
from deployments.replies import Choice, Frame, Json, Shown, merged_extras
from deployments.serving import Tokenizer


class CompletionChoice:
    def __init__(self, index: int, prompt_ids: Sequence[int], shown: Shown, tokenizer: Tokenizer) -> None:
        self._index = index
        self._prompt_ids = prompt_ids
        self._shown = shown
        self._tokenizer = tokenizer
        before = () if shown.echo else prompt_ids
        decoder = tokenizer.incremental(before, skip_special_tokens=not shown.special_tokens)
        self._logprobs = CompletionLogprobs(tokenizer, decoder)
        self._first = True

    def opening(self) -> list[Json]:
        return []

    def add(self, event: TokenEvent) -> list[Json]:
        first, self._first = self._first, False
        extras = self._shown.extras(event, self._prompt_ids, self._tokenizer, first=first)
        logprobs = self._columns(event, first) if self._shown.logprobs else None
        if not (event.text or event.finish_reason or logprobs or extras):
            return []
        choice = {
            "text": event.text,
            "index": self._index,
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
        }
        return [choice | extras]

    def _columns(self, event: TokenEvent, first: bool) -> Json | None:
        token_ids = list(event.token_ids)
        entries: list[TokenLogprob | None] = list(event.logprobs)
        if first and self._shown.echo and event.prompt_logprobs is not None:
            token_ids = [*self._prompt_ids, *token_ids]
            entries = [*event.prompt_logprobs, *entries]
        return self._logprobs.add(token_ids, entries) if token_ids else None


@dataclass(frozen=True, slots=True)
class CompletionReply:
    frame: Frame
    shown: Shown
    tokenizer: Tokenizer

    @property
    def id(self) -> str:
        return self.frame.id

    def choice(self, index: int, prompt_ids: Sequence[int]) -> Choice:
        return CompletionChoice(index, prompt_ids, self.shown, self.tokenizer)

    def chunk(self, choices: list[Json]) -> Json:
        return self.frame.around("text_completion", choices)

    def whole(self, parts: Sequence[Sequence[Json]]) -> Json:
        return self.chunk([self._merged(choice) for choice in parts])

    @staticmethod
    def _merged(parts: Sequence[Json]) -> Json:
        columns: Json = {}
        for logprobs in (part["logprobs"] for part in parts if part["logprobs"] is not None):
            for name, column in logprobs.items():
                columns.setdefault(name, []).extend(column)
        texts = "".join(part["text"] for part in parts)
        return merged_extras(parts) | {"text": texts, "logprobs": columns or None}
