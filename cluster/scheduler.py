"""Which tokens run this step. Plain Python: decides and never runs; no torch, no clock, no I/O.

    waiting ──admit──▶ running ──finish──▶ gone
       ▲                 │
       └────preempt──────┘     pages back, tokens kept: they are computed again later

One budget of tokens per step, spent in this order: decodes (one token each, so that nobody who streams
waits for somebody's long prompt), then prompts already begun, then prompts admitted now.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.config import SchedulerConfig
from cluster.kv_pool import PagePool
from cluster.messages import (
    FinishReason,
    SamplingParams,
    SequenceChunk,
    SequenceStart,
    StepPlan,
    StepResult,
    TokenEvent,
)


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way. Only the scheduler writes here."""

    number: int
    request_id: str
    sampling: SamplingParams  # seed drawn
    token_ids: list[int]  # prompt, then what was generated
    num_prompt: int
    num_computed: int = 0  # tokens whose keys and values are in pages
    num_cached: int = 0  # of the prompt, found in the prefix cache at the first admission
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the full pages whose tokens are all computed
    num_pages_sent: int = 0  # pages the ranks know of
    started: bool = False  # the ranks know the sequence
    answered: bool = False  # an event went out

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_missing(self) -> int:
        """Known tokens not yet computed: 1 while decoding."""
        return len(self.token_ids) - self.num_computed


class Scheduler:
    def __init__(self, config: SchedulerConfig, pool: PagePool, eos_ids: tuple[int, ...]) -> None:
        self._config = config
        self._pool = pool
        self._eos_ids = frozenset(eos_ids)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival
        self._by_request: dict[str, Sequence] = {}
        self._releases: list[int] = []  # sequences the ranks may forget
        self._next_number = 0
        self._next_step = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_steps(self) -> int:
        return self._next_step

    def add(self, request_id: str, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> None:
        assert sampling.seed is not None
        assert request_id not in self._by_request
        sequence = Sequence(self._next_number, request_id, sampling, list(prompt_ids), len(prompt_ids))
        self._next_number += 1
        self._by_request[request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request; False if it is gone already."""
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return False
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            del self._by_request[request_id]
        else:
            self._remove(sequence)
        return True

    def abort_all(self) -> list[str]:
        """Forget every request, for an engine that cannot go on; their ids."""
        request_ids = list(self._by_request)
        for request_id in request_ids:
            self.abort(request_id)
        return request_ids

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run."""
        step = _Step(self._config.max_step_tokens)
        for sequence in [s for s in self._running if s.num_missing == 1]:
            if sequence.started and not self._continue(sequence, step):
                self._preempt(sequence)
        for sequence in [s for s in self._running if s.num_missing > 1]:
            if sequence.started:  # else an earlier arrival has just taken its pages
                self._continue(sequence, step)
        self._admit(step)
        if not step.chunks:
            return None
        releases, self._releases = tuple(self._releases), []
        plan = StepPlan(self._next_step, tuple(step.chunks), tuple(step.starts), releases)
        self._next_step += 1
        return plan

    def postprocess(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Take in what a step gave: tokens appended, finished sequences gone, pages published."""
        assert result.step == plan.step
        by_number = {s.number: s for s in self._running}
        for chunk in plan.chunks:
            sequence = by_number[chunk.seq]
            sequence.num_computed += len(chunk.token_ids)
            self._publish_pages(sequence)
            self.prompt_tokens += max(0, min(sequence.num_computed, sequence.num_prompt) - chunk.start)
        events = []
        for number, token_id in zip(result.seqs, result.token_ids, strict=True):
            sequence = by_number[number]
            sequence.token_ids.append(token_id)
            self.generated_tokens += 1
            reason = self._finish_reason(sequence, token_id)
            cached = 0 if sequence.answered else sequence.num_cached
            sequence.answered = True
            events.append(TokenEvent(sequence.request_id, (token_id,), finish_reason=reason, cached_tokens=cached))
            if reason is not None:
                self._remove(sequence)
        return events

    def check_integrity(self) -> None:
        """Every page's holders are exactly the running sequences that list it."""
        self._pool.check_integrity()
        held = {page for sequence in self._running for page in sequence.pages}
        assert len(held) == self._pool.num_held
        assert all(not sequence.pages for sequence in self._waiting)
        assert {s.request_id for s in (*self._running, *self._waiting)} == set(self._by_request)
        for sequence in self._running:
            assert len(sequence.pages) == len(set(sequence.pages))
            assert sequence.num_computed <= len(sequence.pages) * self._pool.page_size

    def _continue(self, sequence: Sequence, step: _Step) -> bool:
        """Put the sequence's next tokens into the step, taking pages from the latest arrival if need be."""
        length = min(sequence.num_missing, step.budget)
        if length == 0:
            return True
        needed = self._pool.pages_for(sequence.num_computed + length) - len(sequence.pages)
        while needed > self._pool.num_available:
            victim = self._running[-1]
            if victim.number <= sequence.number or victim.number in step.numbers:
                return False
            self._preempt(victim)
        if needed > 0:
            last = sequence.pages[-1] if sequence.pages else None
            sequence.pages += self._pool.allocate(needed, after=last)
        step.add(sequence, length)
        return True

    def _admit(self, step: _Step) -> None:
        while self._waiting and step.budget and len(self._running) < self._config.max_running:
            sequence = self._waiting[0]
            pages, digests = self._pool.find_prefix(sequence.token_ids)
            if self._pool.pages_for(len(sequence.token_ids) + 1) - len(pages) > self._pool.num_available:
                self._pool.release(pages)
                return
            self._waiting.popleft()
            sequence.pages, sequence.digests = pages, digests
            sequence.num_computed = len(pages) * self._pool.page_size
            if not sequence.answered:
                sequence.num_cached = sequence.num_computed
            self._running.append(sequence)
            self._running.sort(key=lambda s: s.number)
            admitted = self._continue(sequence, step)
            assert admitted

    def _publish_pages(self, sequence: Sequence) -> None:
        size = self._pool.page_size
        for index in range(len(sequence.digests), sequence.num_computed // size):
            previous = sequence.digests[-1] if sequence.digests else b""
            digest = self._pool.next_digest(previous, sequence.token_ids[index * size : (index + 1) * size])
            sequence.digests.append(digest)
            self._pool.remember(sequence.pages[index], digest)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos_ids and not sampling.ignore_eos):
            return "stop"
        return "length" if sequence.num_generated >= sampling.max_tokens else None

    def _preempt(self, sequence: Sequence) -> None:
        self._forget_pages(sequence)
        self._running.remove(sequence)
        # By arrival among those that wait: whoever was preempted came before whoever was never admitted.
        index = next((i for i, s in enumerate(self._waiting) if s.number > sequence.number), len(self._waiting))
        self._waiting.insert(index, sequence)
        self.preemptions += 1

    def _remove(self, sequence: Sequence) -> None:
        self._forget_pages(sequence)
        self._running.remove(sequence)
        del self._by_request[sequence.request_id]

    def _forget_pages(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        if sequence.started:
            self._releases.append(sequence.number)
        sequence.pages, sequence.digests = [], []
        sequence.num_computed = sequence.num_pages_sent = 0
        sequence.started = False


class _Step:
    """A plan being filled."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: list[SequenceChunk] = []
        self.starts: list[SequenceStart] = []
        self.numbers: set[int] = set()

    def add(self, sequence: Sequence, length: int) -> None:
        if not sequence.started:
            self.starts.append(SequenceStart(sequence.number, sequence.sampling, sequence.num_generated))
            sequence.started = True
        start = sequence.num_computed
        self.chunks.append(
            SequenceChunk(
                sequence.number,
                tuple(sequence.token_ids[start : start + length]),
                start,
                tuple(sequence.pages[sequence.num_pages_sent :]),
                sample=start + length == len(sequence.token_ids),
            )
        )
        sequence.num_pages_sent = len(sequence.pages)
        self.numbers.add(sequence.number)
        self.budget -= length
