"""The engine as HTTP sees it: one async iterator of token events per answer, and a few facts.

cluster/engine.py satisfies it with ranks behind it, the tests with a script.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from cluster.messages import EngineStats, RankStatus, Request, TokenEvent


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation; TokenizerError where the model's template refuses it."""


class Engine(Protocol):
    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def healthy(self) -> bool:
        """False: nothing but a new replica helps."""

    @property
    def ready(self) -> bool:
        """Whether a request that comes now would be answered."""

    def generate(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Raises EngineError before the first event or instead of a later one; closing it aborts the request."""

    def stats(self) -> EngineStats: ...

    def ranks(self) -> tuple[RankStatus, ...]: ...

    async def stop(self) -> None: ...
