"""Which tokens run this step. Plain Python: decides and never runs; no torch, no I/O, no clock it was not given.

    waiting ──admit──▶ running ──finish──▶ gone
       ▲                 │
       └────preempt──────┘     pages back, tokens kept: they are computed again later

One budget of tokens per step, spent in this order: decodes (one token each, so that nobody who streams waits for
somebody's long prompt), then prompts already begun, then prompts admitted now.

It plans one step ahead: while step n runs, n + 1 is scheduled as if nobody ended in n. The token that n samples is
named LAST_SAMPLED in n + 1, and whoever did end in n is left out of n + 1's results. Steps run in order, so a page
given back while a step still writes to it is safe: its next owner writes later.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.config import SchedulerConfig
from cluster.kv_pool import PagePool
from cluster.messages import (
    EncodeEvent,
    EncodeRequest,
    Request,
    SequenceChunk,
    SequenceStart,
    StepPlan,
    StepResult,
    TokenEvent,
)
from cluster.sequence import Sequence
from cluster.waiting import WaitingQueue

Event = TokenEvent | EncodeEvent

DEADLINE = "deadline"
ROOM_TOKENS = 256  # what a new run of pages leaves free behind it for the answer, at most


@dataclass(slots=True)
class _Step:
    """A plan being filled, and whom it is for."""

    budget: int
    chunks: list[SequenceChunk]
    starts: list[SequenceStart]
    sequences: list[tuple[Sequence, int]]  # with the life they are in, beside chunks

    def add(self, sequence: Sequence, length: int) -> None:
        if not sequence.started:
            self.starts.append(sequence.start())
            sequence.started = True
        self.chunks.append(sequence.chunk(length))
        self.sequences.append((sequence, sequence.life))
        self.budget -= length


class Scheduler:
    def __init__(
        self, config: SchedulerConfig, pool: PagePool, eos_ids: Iterable[int], window: int | None = None
    ) -> None:
        self._config = config
        self._pool = pool
        self._eos_ids = frozenset(eos_ids)
        self._window = window  # tokens that attention looks back, itself included; None: all
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._running: list[Sequence] = []  # by order
        self._requests: dict[str, dict[int, Sequence]] = {}  # key -> choice -> sequence, while they live
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; the dead are skipped when they come up
        self._under_way: deque[list[tuple[Sequence, int]]] = deque()  # whom the steps not yet postprocessed are for
        self._releases: list[int] = []  # sequences the ranks may forget
        self._next_number = 0
        self._next_step = 0
        self.steps = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._under_way)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._requests.values())) - len(self._running)

    def add(self, key: str, request: Request | EncodeRequest) -> None:
        assert key not in self._requests
        if isinstance(request, EncodeRequest):
            sequence = self._sequence(key, 0, request, None)
        else:
            assert request.sampling.seed is not None
            sequence = self._sequence(key, 0, request, None)
            for choice in range(1, request.n):
                sequence.followers.append(self._sequence(key, choice, request, sequence))
        self._requests[key] = {s.choice: s for s in (sequence, *sequence.followers)}
        self._waiting.push(sequence)
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, sequence.number, sequence))

    def abort(self, key: str, choice: int | None = None) -> bool:
        """Forget a request, or one of its choices; False if it is gone already."""
        sequences = [s for s in self._requests.get(key, {}).values() if choice is None or s.choice == choice]
        for sequence in sequences:
            self._drop(sequence)
        return bool(sequences)

    def fail_all(self, error: str) -> list[Event]:
        """End every request, for an engine that cannot go on."""
        sequences = [s for choices in self._requests.values() for s in choices.values()]
        for sequence in sequences:
            self._drop(sequence)
        return [sequence.failure(error) for sequence in sequences]

    def start_over(self) -> None:
        """The ranks have forgotten everything: whoever ran waits again, with the tokens it has."""
        self._under_way.clear()
        self._releases.clear()
        self._next_step = 0
        for sequence in self._running:
            sequence.in_flight = 0
            self._pool.release(sequence.lose_pages())
            self._waiting.push(sequence)
        self._running.clear()
        for sequence in self._waiting:  # also those that were preempted with a sample under way
            sequence.in_flight = 0
        self._pool.forget()

    def expire(self, now: float) -> list[Event]:
        """End the requests that have not begun by their deadline."""
        events: list[Event] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, first = heapq.heappop(self._deadlines)
            sequences = list(self._requests.get(first.key, {}).values())
            if not any(sequence.answered or sequence.running for sequence in (first, *sequences)):
                self.abort(first.key)
                events += [sequence.failure(DEADLINE) for sequence in sequences]
        return events

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run."""
        step = _Step(self._config.max_step_tokens, [], [], [])
        decodes, prompts = [], []
        for sequence in self._running:
            missing = sequence.num_missing
            if missing == 1:
                decodes.append(sequence)
            elif missing > 1:
                prompts.append(sequence)
        for sequence in decodes:
            if sequence.running and not self._continue(sequence, step):
                self._preempt(sequence)
        for sequence in prompts:
            if sequence.running:  # else an earlier one has just taken its pages
                self._continue(sequence, step)
        self._admit(step)
        if not step.chunks:
            return None
        releases, self._releases = tuple(self._releases), []
        plan = StepPlan(self._next_step, tuple(step.chunks), tuple(step.starts), releases)
        self._next_step += 1
        self.steps += 1
        self._under_way.append(step.sequences)
        return plan

    def postprocess(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Take in what a step gave: tokens appended, finished sequences gone, pages published."""
        assert result.step == plan.step
        sampled = dict(zip(result.seqs, result.token_ids, strict=True))
        events: list[Event] = []
        for chunk, (sequence, life) in zip(plan.chunks, self._under_way.popleft(), strict=True):
            if chunk.sample:
                sequence.in_flight -= 1
            if sequence.gone:
                continue  # it ended, or was aborted, while this step ran
            if result.failed and sequence.number in result.failed:
                events.append(sequence.failure(result.failed[sequence.number]))
                self._drop(sequence)
                continue
            if life == sequence.life:
                self._accept(sequence, chunk, result)
            elif sequence.wants_all_rows:
                continue  # preempted meanwhile: its rows must come from one life, so all of them come again
            if chunk.sample:
                events.append(self._answer(sequence, sampled.get(sequence.number), result))
        return events

    def check_integrity(self) -> None:
        """Every page's holders are exactly the running sequences that list it."""
        self._pool.check_integrity()
        held: dict[int, int] = {}
        for sequence in self._running:
            assert sequence.running
            assert sequence.num_accepted <= sequence.num_scheduled <= len(sequence.pages) * self._pool.page_size
            for page in sequence.pages[sequence.num_pages_released :]:
                held[page] = held.get(page, 0) + 1
        assert held == self._pool.references()
        alive = {id(s) for choices in self._requests.values() for s in choices.values()}
        assert {id(s) for s in self._running} <= alive
        assert all(id(s) in alive and not s.pages and not s.running for s in self._waiting)
        assert [s.order for s in self._running] == sorted(s.order for s in self._running)

    def _sequence(self, key: str, choice: int, request: Request | EncodeRequest, leader: Sequence | None) -> Sequence:
        number, self._next_number = self._next_number, self._next_number + 1
        if isinstance(request, EncodeRequest):
            ids, sampling, pooling, salt = list(request.token_ids), None, request.pooling, ""
        else:
            assert request.sampling.seed is not None
            sampling = replace(request.sampling, seed=request.sampling.seed + choice)
            if choice:
                sampling = replace(sampling, prompt_logprobs=None)  # they are the first choice's to give
            ids, pooling, salt = list(request.prompt_ids), None, request.cache_salt
        return Sequence(
            number, key, choice, ids, len(ids), sampling, pooling,
            request.priority, request.user, salt, request.deadline_s, leader,
        )  # fmt: skip

    def _continue(self, sequence: Sequence, step: _Step) -> bool:
        """Put the sequence's next tokens into the step, taking pages from whoever comes last if need be."""
        length = min(sequence.num_missing, step.budget)
        if length == 0:
            return True
        needed = self._pool.pages_for(sequence.num_scheduled + length) - len(sequence.pages)
        while needed > self._pool.num_available:
            victim = self._running[-1]
            if victim.order <= sequence.order or any(s is victim for s, _ in step.sequences):
                # Nobody to take pages from: as much as fits.
                needed = self._pool.num_available
                length = (len(sequence.pages) + needed) * self._pool.page_size - sequence.num_scheduled
                if length == 0:
                    return False
                break
            self._preempt(victim)
        if needed > 0:
            last = sequence.pages[-1] if sequence.pages else None
            sequence.pages += self._pool.allocate(needed, after=last, room=self._room(sequence))
        step.add(sequence, length)
        self._waiting.charge(sequence, length)
        return True

    def _room(self, sequence: Sequence) -> int:
        """Pages the sequence may still come to need."""
        tokens = len(sequence.token_ids) - sequence.num_scheduled
        if sequence.sampling is not None:
            tokens += min(ROOM_TOKENS, sequence.sampling.max_tokens - sequence.num_generated)
        return self._pool.pages_for(max(0, tokens))

    def _admit(self, step: _Step) -> None:
        while step.budget and len(self._running) < self._config.max_running:
            sequence = self._waiting.peek()
            if sequence is None or sequence.in_flight:
                return  # preempted a moment ago: its last token is still to come
            pages, digests = self._prefix(sequence)
            if self._pages_to_begin(sequence) - len(pages) > self._pool.num_available:
                self._pool.release(pages)
                return
            self._waiting.remove(sequence)
            self._waiting.admitted(sequence)
            sequence.pages, sequence.digests = pages, digests
            in_pages = len(pages) * self._pool.page_size
            # One token is computed in any case: somebody must give the next one's logits.
            sequence.num_scheduled = sequence.num_accepted = min(in_pages, len(sequence.token_ids) - 1)
            sequence.num_stored = in_pages - sequence.num_scheduled
            if not sequence.answered:
                sequence.num_cached = min(sequence.num_scheduled, sequence.num_prompt)
                self.cached_tokens += sequence.num_cached
            sequence.running = True
            bisect.insort(self._running, sequence, key=lambda s: s.order)
            admitted = self._continue(sequence, step)
            assert admitted

    def _pages_to_begin(self, sequence: Sequence) -> int:
        """Pages that must be there before a sequence is admitted: enough to reach its first new token."""
        tokens = len(sequence.token_ids) + (sequence.sampling is not None)
        if self._window is not None:
            tokens = min(tokens, self._window + self._config.max_step_tokens)
        return min(self._pool.pages_for(tokens), self._pool.num_pages)

    def _prefix(self, sequence: Sequence) -> tuple[list[int], list[bytes]]:
        """Pages that hold the first of the sequence's tokens already, now held for it too."""
        if sequence.wants_all_rows:
            return [], []
        full = sequence.num_prompt // self._pool.page_size
        leader = sequence.leader
        if leader is not None and leader.num_accepted >= leader.num_prompt and not leader.num_pages_released:
            pages = leader.pages[:full]
            self._pool.retain(pages)
            return list(pages), leader.digests[:full]
        return self._pool.find_prefix(sequence.token_ids, sequence.salt)

    def _accept(self, sequence: Sequence, chunk: SequenceChunk, result: StepResult) -> None:
        """The chunk's tokens are in pages, and steps to come may rely on it."""
        sequence.num_accepted = accepted = chunk.start + len(chunk.token_ids)
        size = self._pool.page_size
        if accepted // size > len(sequence.digests) and (self._pool.prefix_caching or sequence.followers):
            self._publish(sequence)
        if self._window is not None:
            passed = max(0, accepted - self._window + 1) // size
            if passed > sequence.num_pages_released:
                self._pool.release(sequence.pages[sequence.num_pages_released : passed])
                sequence.num_pages_released = passed
        if chunk.start < sequence.num_prompt:
            self.prompt_tokens += min(accepted, sequence.num_prompt) - chunk.start
            if accepted >= sequence.num_prompt:
                self._release_followers(sequence)
        if sequence.wants_all_rows:
            sequence.prompt_logprobs += result.prompt_logprobs.get(sequence.number, ())
            sequence.pooled += result.pooled.get(sequence.number, ())

    def _publish(self, sequence: Sequence) -> None:
        """Whoever has the same tokens may use the pages that are full now."""
        size = self._pool.page_size
        for index in range(len(sequence.digests), sequence.num_accepted // size):
            previous = sequence.digests[-1] if sequence.digests else sequence.salt.encode()
            digest = self._pool.next_digest(previous, sequence.token_ids[index * size : (index + 1) * size])
            sequence.digests.append(digest)
            self._pool.remember(sequence.pages[index], digest)

    def _answer(self, sequence: Sequence, token_id: int | None, result: StepResult) -> Event:
        """What the step that ended the sequence's known tokens says to its caller."""
        if token_id is None:
            encoded = EncodeEvent(sequence.key, tuple(sequence.pooled))
            self._drop(sequence)
            return encoded
        self.generated_tokens += 1
        event = sequence.take(token_id, result.logprobs.get(sequence.number), self._eos_ids)
        if event.finish_reason is not None:
            self._drop(sequence)
        return event

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._forget_pages(sequence)
        self._waiting.push(sequence)
        self.preemptions += 1

    def _drop(self, sequence: Sequence) -> None:
        """The sequence is gone, wherever it was."""
        sequence.gone = True
        if sequence.running:
            self._running.remove(sequence)
            self._forget_pages(sequence)
        elif sequence.leader is not None and sequence in sequence.leader.followers:
            sequence.leader.followers.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._release_followers(sequence)
        choices = self._requests[sequence.key]
        del choices[sequence.choice]
        if not choices:
            del self._requests[sequence.key]

    def _release_followers(self, leader: Sequence) -> None:
        """The other choices of a prompt need wait no longer: its pages are there, or will never be."""
        followers, leader.followers = leader.followers, []
        for follower in followers:
            self._waiting.push(follower)

    def _forget_pages(self, sequence: Sequence) -> None:
        if sequence.started:
            self._releases.append(sequence.number)
        self._pool.release(sequence.lose_pages())
