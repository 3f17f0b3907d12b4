"""What crosses between HTTP, the engine and the ranks: frozen dataclasses, nothing else.

    HTTP  --Request-->  Engine  --StepPlan-->  ranks  --StepResult-->  Engine  --TokenEvent-->  HTTP

Each field says who fills it. Knows neither torch nor ray; every message pickles in microseconds.

The plan decides everything. A rank keeps, per sequence, what earlier plans told it (sampling
parameters, page table), so that a step costs bytes for what is new, not for what is old.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
Exchange = Literal["none", "all_to_all", "all_reduce"]
Pooling = Literal["last", "mean", "all"]
Routing = tuple[tuple[tuple[int, float], ...], ...]  # of one token: per layer, (expert, weight), best first


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole answer must match. Filled by HTTP; compiled beside the sampler, rebuilt by replaying tokens."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    text: str  # the schema, expression or grammar; of choice, a JSON list of texts; of json_object, empty
    opens_text: bool = False  # the answer does not go on from the prompt's text. Filled by the engine


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request turns logits into tokens. Filled by HTTP, which validates; read by engine and ranks."""

    max_tokens: int  # HTTP: already capped by max_model_len - prompt
    min_tokens: int = 0  # before these, nothing that ends an answer is sampled
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: the engine draws one at admission, so that a replay gives the same tokens
    stop: tuple[str, ...] = ()  # texts that end the answer
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # each as token ids: the last is kept from following the rest
    grammar: Grammar | None = None
    logprobs: int | None = None  # of every sampled token, with so many likeliest beside it; None: none
    prompt_logprobs: int | None = None  # likewise of every prompt token but the first
    return_routing: bool = False  # with every sampled token, the experts of the row it was sampled from


@dataclass(frozen=True, slots=True)
class Request:
    """n answers wanted for one prompt. Filled by HTTP."""

    request_id: str
    prompt_ids: tuple[int, ...]  # never empty
    sampling: SamplingParams
    n: int = 1  # choice i is sampled with seed + i
    continues_prompt: bool = True  # a completion's text goes on from the prompt's; a chat message is a text of its own
    echo: bool = False  # the prompt's text comes before the answer's
    priority: int = 0  # lower runs first, and is preempted last
    user: str = ""  # whose request it is: under contention users get equal shares of tokens
    cache_salt: str = ""  # requests share cached prefixes only with requests of the same salt
    deadline_s: float | None = None  # on time.monotonic(): not started by then, it fails with "deadline"


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """Hidden states or class scores wanted for one text. Filled by HTTP."""

    request_id: str
    token_ids: tuple[int, ...]  # never empty
    pooling: Pooling  # last token, mean of all, or one row for every token
    priority: int = 0
    user: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model thought of one token, before temperature, bans and penalties. Filled by rank 0."""

    token_id: int
    logprob: float
    rank: int  # 1: the likeliest
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, as many as were asked for


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step added to one choice of a request. Filled by the engine loop; text by Engine.generate."""

    request_id: str
    token_ids: tuple[int, ...]  # the token that ended the answer included: it was computed, it counts
    choice: int = 0
    text: str = ""  # whole characters only, without what ended the answer (but see include_stop_str_in_output)
    finish_reason: FinishReason | None = None  # set on exactly the last event of a choice
    stop_reason: str | int | None = None  # with "stop": the stop string or stop token id; None: end of sequence
    error: str | None = None  # with "error": one sentence for the caller
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache; set on the first event of choice 0
    waited_s: float | None = None  # from arrival to the first step; set on the first event of choice 0
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each of token_ids, if asked for
    routing: tuple[Routing, ...] = ()  # one for each of token_ids, if asked for
    # With the first event of choice 0, if asked for: one for each prompt token; None for the first.
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class EncodeEvent:
    """The whole answer to an EncodeRequest: rows, or why there are none. Filled by the engine loop."""

    request_id: str
    rows: tuple[tuple[float, ...], ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence begins (or begins again, after preemption or recovery) on the ranks. Filled by the scheduler."""

    seq: int  # the engine's number for the sequence, unique while the engine lives
    token_ids: tuple[int, ...]  # all known by now, prompt and generated: penalties and grammars are replayed from them
    num_prompt: int  # of these
    sampling: SamplingParams | None = None  # seed already drawn; None: nothing is sampled
    pooling: Pooling | None = None  # what is wanted of a sequence that is not sampled
    group: int = 0  # the data group that computes it, for as long as it holds pages there


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """The tokens of one sequence that this step computes. Filled by the scheduler.

    token_ids   [t0 t1 t2]      positions start .. start+2
    page table  earlier pages + new_pages, together enough for start + len(token_ids) tokens
    """

    seq: int
    token_ids: tuple[int, ...]  # a piece of the known tokens; LAST_SAMPLED: what the rank sampled a step ago
    start: int  # position of token_ids[0]
    new_pages: tuple[int, ...]  # appended to the rank's page table of the sequence, before the step
    sample: bool  # the chunk ends the sequence's tokens: sample the next one, or pool
    num_stored: int = (
        0  # first tokens of the chunk whose keys and values are in shared pages already: not written again
    )

    def __reduce__(self) -> tuple[type[SequenceChunk], tuple[object, ...]]:
        """A plan has one for every sequence and goes to every rank: so it pickles five times as fast as by fields."""
        return SequenceChunk, (self.seq, self.token_ids, self.start, self.new_pages, self.sample, self.num_stored)


LAST_SAMPLED = -1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of all ranks of a group. Filled by the scheduler; the exchange by the engine's rule."""

    step: int  # counts up by one per step; a rank refuses a gap
    chunks: tuple[SequenceChunk, ...]  # in this order on every rank; those of group 0 first, then of group 1, ...
    starts: tuple[SequenceStart, ...] = ()  # sequences that appear for the first time
    releases: tuple[int, ...] = ()  # sequences to forget, before the starts
    exchange: Exchange = "none"
    group_tokens: tuple[int, ...] = ()  # tokens of each data group, an idle one's 0; empty: there is one group
    placement: int = 0  # number of the expert placement that this step uses; the ranks were given it before
    report_load: bool = False  # the result says how many rows each slot has computed since the last report
    canary: bool = False  # no chunks: made-up rows through every slot and collective, compared with a known answer
    capture: int = 0  # no chunks: the graph of decode steps of so many rows in each data group is captured
    graph: int = 0  # rows of the captured graph that this step replays, all groups padded to it; 0: it is computed

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds one rank spent in the parts of a step. Filled by the worker."""

    build: float = 0.0  # plan -> tensors; most of it beside the step before
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
    """What a step gave. Filled by rank 0 of each tensor group for its own sequences, made one by the worker group.

    The other ranks fill step, times and slot_rows alone.
    """

    step: int
    seqs: tuple[int, ...]  # the sequences that were sampled, in plan order
    token_ids: tuple[int, ...]  # one for each of seqs
    times: StepTimes  # of rank 0
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # of sampled sequences that asked
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)  # of this step's prompt tokens
    # Rows of this step's tokens where all are wanted, else the one row of a sequence that is complete.
    pooled: dict[int, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # sequences that cannot go on, and why; the others can
    routing: dict[int, Routing] = field(default_factory=dict)  # of sampled sequences that asked
    # If the plan wants the load: per layer, rows of every slot since the last report. Of a rank: its own slots; of the
    # group: all slots, rank by rank.
    slot_rows: tuple[tuple[int, ...], ...] = ()
    graph: bool | None = None  # of rank 0: whether a captured graph was replayed; None: it has captured none


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
    state: Literal["loading", "ready", "frozen", "dead"]
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
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache


@dataclass(frozen=True, slots=True)
class ExpertsStatus:
    """Where the experts are and how much each is used. Filled by Engine.experts()."""

    placement: int  # its number: counts up with every change
    slices: int  # parts each expert is cut into; the ranks of one slot hold one part each
    ranks: tuple[tuple[tuple[int, ...], ...], ...]  # per layer and expert, the ranks that hold it
    load: tuple[
        tuple[float, ...], ...
    ]  # per layer and expert, its share of all rows lately; a layer sums to 1, or to 0
    # Per layer, rows of the busiest rank over the mean of all ranks lately; 1: even.
    imbalance: tuple[float, ...]
