"""What crosses between HTTP, the engine and the ranks: frozen dataclasses, nothing else.

    HTTP  --Request-->  Engine  --StepPlan-->  ranks  --StepResult-->  Engine  --TokenEvent-->  HTTP

Each field says who fills it. Knows neither torch nor ray; every message pickles in microseconds.

The plan decides everything. A rank keeps, per sequence, what earlier plans told it (sampling
parameters, page table), so that a step costs bytes for what is new, not for what is old.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
Exchange = Literal["none", "all_to_all", "all_reduce"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request turns logits into tokens. Filled by HTTP (validated there), read by engine and ranks."""

    max_tokens: int  # HTTP: already capped by max_model_len - prompt
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: the engine draws one at admission, so that a replay gives the same tokens
    stop: tuple[str, ...] = ()  # texts that end the answer; never part of it
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One answer wanted for one prompt. Filled by HTTP."""

    request_id: str
    prompt_ids: tuple[int, ...]  # never empty
    sampling: SamplingParams
    continues_prompt: bool = True  # a completion's text goes on from the prompt's; a chat message is a text of its own


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step added to one request. Ids and reason: the engine loop; text: Engine.generate, which decodes."""

    request_id: str
    token_ids: tuple[int, ...]  # the token that ended the answer included: it was computed, it counts
    text: str = ""  # whole characters only, without what ended the answer
    finish_reason: FinishReason | None = None  # set on exactly the last event
    error: str | None = None  # with finish_reason "error": one sentence for the caller
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache; set on the first event


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence begins (or begins again, after preemption or recovery) on the ranks. Filled by the scheduler."""

    seq: int  # the engine's number for the sequence, unique while the engine lives
    sampling: SamplingParams  # seed already drawn
    num_generated: int  # tokens sampled before this start: the next one is number num_generated of the seeded stream


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """The tokens of one sequence that this step computes. Filled by the scheduler.

    token_ids   [t0 t1 t2]      positions start .. start+2
    page table  earlier pages + new_pages, together enough for start + len(token_ids) tokens
    """

    seq: int
    token_ids: tuple[int, ...]  # a piece of the prompt, or the one token sampled last
    start: int  # position of token_ids[0] = tokens of the sequence already in pages
    new_pages: tuple[int, ...]  # appended to the rank's page table of the sequence, before the step
    sample: bool  # the chunk ends the known tokens: sample the next one


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of all ranks of a group. Filled by the scheduler; the exchange by the engine's rule."""

    step: int  # counts up by one per step; a rank refuses a gap
    chunks: tuple[SequenceChunk, ...]  # in this order on every rank
    starts: tuple[SequenceStart, ...] = ()  # sequences that appear for the first time
    releases: tuple[int, ...] = ()  # sequences to forget, before the starts
    exchange: Exchange = "none"

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds one rank spent in the parts of a step. Filled by the worker."""

    build: float = 0.0  # plan -> tensors
    attention: float = 0.0  # norms, projections, pages, attention
    router: float = 0.0
    experts: float = 0.0
    exchange: float = 0.0  # every collective, waiting for the slowest rank included
    head: float = 0.0  # embedding, last norm, LM head
    sample: float = 0.0

    @property
    def total(self) -> float:
        return self.build + self.attention + self.router + self.experts + self.exchange + self.head + self.sample


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave. Filled by rank 0 of the tensor group."""

    step: int
    seqs: tuple[int, ...]  # the sequences that were sampled, in plan order
    token_ids: tuple[int, ...]  # one for each of seqs
    times: StepTimes  # of rank 0


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a rank knows of itself once its weights are loaded. Filled by Worker.load()."""

    pid: int
    node: str
    device: str
    weight_bytes: int
    load_seconds: float
    bytes_per_page: int
    free_bytes: int  # for pages: of the device, after the weights


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One row of /health. Filled by the worker group."""

    rank: int
    pid: int
    node: str
    device: str
    state: Literal["loading", "ready", "dead"]
    last_step_age_s: float | None  # None: no step yet


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of a running engine. Filled by Engine.stats()."""

    running: int
    waiting: int
    pages_total: int
    pages_used: int
    steps: int
    prompt_tokens: int  # computed, not cached
    generated_tokens: int
    preemptions: int
    recoveries: int = 0  # times the ranks were formed anew after a death
