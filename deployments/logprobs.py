"""Log-probabilities in the forms of OpenAI's two APIs, and in vLLM's for prompts. Pure: dictionaries, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.messages import TokenLogprob
from deployments.serving import Decoder, Tokenizer

Json = dict[str, Any]
LEAST = -9999.0  # JSON has no infinity; what cannot be sampled has this


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> Json:
    def one(token_id: int, logprob: float) -> Json:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, LEAST),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        one(entry.token_id, entry.logprob) | {"top_logprobs": [one(*likely) for likely in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Of one choice: lists side by side, one element per token. Offsets count characters of the choice's text."""

    def __init__(self, tokenizer: Tokenizer, decoder: Decoder) -> None:
        self._tokenizer = tokenizer
        self._decoder = decoder  # makes the same text as the engine does
        self._offset = 0

    def add(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> Json:
        """None: the first token of a text, which nothing predicts."""
        columns: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            columns["tokens"].append(self._tokenizer.token_text(token_id))
            columns["token_logprobs"].append(None if entry is None else max(entry.logprob, LEAST))
            columns["top_logprobs"].append(None if entry is None else self._top(entry))
            columns["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push([token_id]))
        return columns

    def _top(self, entry: TokenLogprob) -> Json:
        """By text, as OpenAI has it: of tokens with the same text the likeliest. The sampled one is always there."""
        by_text: Json = {}
        for token_id, logprob in [*entry.top, (entry.token_id, entry.logprob)]:
            by_text.setdefault(self._tokenizer.token_text(token_id), max(logprob, LEAST))
        return by_text


def prompt_logprobs(entries: Sequence[TokenLogprob | None], tokenizer: Tokenizer) -> list[Json | None]:
    """By token id: its log-probability, rank and text; the likeliest ones, and the one that the prompt has."""
    return [None if entry is None else _ranked(entry, tokenizer) for entry in entries]


def _ranked(entry: TokenLogprob, tokenizer: Tokenizer) -> Json:
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)]
    ranked.append((entry.token_id, entry.logprob, entry.rank))
    return {
        str(token_id): {
            "logprob": max(logprob, LEAST),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob, rank in ranked
    }
