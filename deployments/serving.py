"""The engine as HTTP sees it: one async iterator of token events per request, rows of numbers, and a few facts.

cluster/engine.py satisfies it with ranks behind it, the tests with a script.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cluster.config import SchedulerConfig
from cluster.messages import EncodeRequest, EngineStats, ExpertsStatus, Grammar, RankStatus, Request, TokenEvent
from cluster.rebalancing import Rebalancing
from deployments.admission import Pace
from deployments.live import Live
from deployments.metrics import Metrics

Task = Literal["generate", "embed", "classify", "token_classify", "question_answering"]


class Decoder(Protocol):
    def push(self, ids: Sequence[int]) -> str:
        """The characters that these ids complete."""

    def flush(self) -> str: ...


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def incremental(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Decoder: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a conversation; TokenizerError where the model's template refuses it."""


class Engine(Protocol):
    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def task(self) -> Task:
        """What the checkpoint was made for."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What the scores of a classifier mean, in order."""

    @property
    def healthy(self) -> bool:
        """False: nothing but a new replica helps."""

    @property
    def recovering(self) -> bool:
        """Whether ranks are being replaced; it can serve, but later."""

    @property
    def ready(self) -> bool:
        """Whether a request that comes now would be answered."""

    def generate(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Raises EngineError before the first event or instead of a later one; closing it aborts the request."""

    async def prepare(self, grammar: Grammar, *, opens_text: bool) -> None:
        """Raises RequestInvalid where generate() would, because of the grammar."""

    async def encode(self, request: EncodeRequest) -> list[list[float]]:
        """One row, or one for each token. Raises EngineError; cancelling it aborts the request."""

    def stats(self) -> EngineStats: ...

    def ranks(self) -> tuple[RankStatus, ...]: ...

    def experts(self) -> ExpertsStatus: ...

    def doubts(self) -> list[str]:
        """Expert slots and collectives that have not shown lately that they work."""

    async def rebalance(self) -> Rebalancing:
        """Move experts by the load lately. Raises EngineError where that cannot be now."""

    def limit(self, limits: SchedulerConfig) -> None:
        """Admit by these from now on; none is above what the engine was started with."""

    def drain(self) -> None:
        """Take no more requests; those that run go on."""

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Service:
    """What every route works with."""

    engine: Engine
    task: Task  # what is answered, of what the checkpoint can do
    model_names: Sequence[str]
    fingerprint: str  # of everything that decides which tokens a seed gives
    live: Live
    pace: Pace
    metrics: Metrics
    keep_alive_s: float  # silence after which a stream gets a comment
