"""One data group: the sequences that run there, on pages of their own, and its part of every step.

Groups compute side by side, each within its own budget of tokens; none can take pages from another. Knows neither
requests nor who waits: whoever loses its pages here is handed back to the scheduler.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from cluster.kv_pool import PagePool
from cluster.messages import SequenceChunk, SequenceStart
from cluster.sequence import Sequence

ROOM_TOKENS = 256  # what a new run of pages leaves free behind it for the answer, at most


@dataclass(slots=True)
class GroupStep:
    """A group's part of a plan that is being filled."""

    budget: int  # tokens it may still take
    chunks: dict[Sequence, SequenceChunk] = field(default_factory=dict)
    starts: list[SequenceStart] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks.values())

    def add(self, sequence: Sequence, length: int) -> None:
        if not sequence.started:
            self.starts.append(sequence.start())
            sequence.started = True
        self.chunks[sequence] = sequence.chunk(length)
        self.budget -= length


class DataGroup:
    def __init__(self, number: int, pool: PagePool, window: int | None) -> None:
        self.number = number
        self.pool = pool
        self._window = window  # tokens that attention looks back, itself included; None: all
        self.running: list[Sequence] = []  # by order

    def advance(self, step: GroupStep, only: str | None = None) -> list[Sequence]:
        """Put the next tokens of everybody, or of one request, into the step; whoever lost its pages over that."""
        decodes: list[tuple[Sequence, int]] = []
        prompts: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            if only is not None and sequence.key != only:
                continue
            missing = sequence.num_missing
            if missing == 1:
                decodes.append((sequence, 1))
            elif missing > 1:
                prompts.append((sequence, missing))
        lost: list[Sequence] = []
        for sequence, missing in decodes:
            if sequence.running and not self._continue(sequence, missing, step, lost):
                self._preempt(sequence, lost)
        for sequence, missing in prompts:
            if sequence.running:  # else an earlier one has just taken its pages
                self._continue(sequence, missing, step, lost)
        return lost

    def prefix(self, sequence: Sequence) -> list[int]:
        """Pages here that hold the first of the sequence's tokens already; nobody holds them for it yet."""
        if sequence.wants_all_rows:
            return []
        pages = self.pool.find(sequence.digests)
        leader = sequence.leader
        if leader is not None and self.has_prompt_of(leader):
            pages = max(pages, leader.pages[: leader.num_prompt // self.pool.page_size], key=len)
        return pages

    def has_prompt_of(self, sequence: Sequence) -> bool:
        """Are all pages of its prompt here, filled, and still its own?"""
        here = sequence.running and sequence.group == self.number
        return here and sequence.num_accepted >= sequence.num_prompt and not sequence.num_pages_released

    def fits(self, sequence: Sequence, pages: list[int], max_step_tokens: int) -> bool:
        """Are there pages enough to reach the sequence's first new token from these on?"""
        tokens = len(sequence.token_ids) + (sequence.sampling is not None)
        if self._window is not None:
            tokens = min(tokens, self._window + max_step_tokens)
        needed = min(self.pool.pages_for(tokens), self.pool.num_pages)
        return needed - len(pages) <= self.pool.num_available_beside(pages)

    def admit(self, sequence: Sequence, pages: list[int], step: GroupStep) -> None:
        """The sequence runs here from now on, beginning behind the pages that hold its first tokens."""
        self.pool.hold(pages)
        sequence.group, sequence.running = self.number, True
        sequence.pages, sequence.num_pages_published = pages, len(pages)
        sequence.num_stored = len(pages) * self.pool.page_size
        # One token is computed in any case: somebody must give the next one's logits.
        sequence.num_scheduled = sequence.num_accepted = min(sequence.num_stored, len(sequence.token_ids) - 1)
        bisect.insort(self.running, sequence, key=_order)
        lost: list[Sequence] = []
        admitted = self._continue(sequence, sequence.num_missing, step, lost)
        assert admitted
        assert not lost

    def accept(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence's first tokens are in pages, and steps to come may rely on it."""
        sequence.num_accepted = num_tokens
        full = num_tokens // self.pool.page_size
        if self.pool.prefix_caching and full > sequence.num_pages_published:
            self.pool.extend(sequence.digests, sequence.token_ids, sequence.salt)
            for index in range(sequence.num_pages_published, full):
                self.pool.remember(sequence.pages[index], sequence.digests[index])
            sequence.num_pages_published = full
        if self._window is not None:
            passed = max(0, num_tokens - self._window + 1) // self.pool.page_size
            if passed > sequence.num_pages_released:
                self.pool.release(sequence.pages[sequence.num_pages_released : passed])
                sequence.num_pages_released = passed

    def remove(self, sequence: Sequence) -> None:
        """The sequence runs here no more."""
        index = bisect.bisect_left(self.running, sequence.order, key=_order)
        assert self.running[index] is sequence
        del self.running[index]
        self.pool.release(sequence.lose_pages())

    def start_over(self, *, pages_lost: bool) -> list[Sequence]:
        """The ranks have forgotten their sequences, perhaps the pages too; who has to wait and begin again."""
        for sequence in self.running:
            sequence.rewind()
        again = [s for s in self.running if pages_lost or s.pooling is not None]  # pooled rows were on the ranks
        for sequence in again:
            self.remove(sequence)
        if pages_lost:
            self.pool.forget()
        return again

    def check_integrity(self) -> None:
        """Every page's holders are exactly the running sequences that list it."""
        self.pool.check_integrity()
        held: dict[int, int] = {}
        for sequence in self.running:
            assert sequence.running
            assert sequence.group == self.number
            assert sequence.num_accepted <= sequence.num_scheduled <= len(sequence.pages) * self.pool.page_size
            for page in sequence.pages[sequence.num_pages_released :]:
                held[page] = held.get(page, 0) + 1
        assert held == self.pool.references()
        assert [s.order for s in self.running] == sorted(s.order for s in self.running)

    def _continue(self, sequence: Sequence, missing: int, step: GroupStep, lost: list[Sequence]) -> bool:
        """Put the sequence's next tokens into the step, taking pages from whoever comes last if need be."""
        length = min(missing, step.budget)
        if length == 0:
            return True
        needed = self.pool.pages_for(sequence.num_scheduled + length) - len(sequence.pages)
        while needed > self.pool.num_available:
            victim = self.running[-1]
            if victim.order <= sequence.order or victim in step.chunks:
                # Nobody to take pages from: as much as fits.
                needed = self.pool.num_available
                length = (len(sequence.pages) + needed) * self.pool.page_size - sequence.num_scheduled
                if length == 0:
                    assert len(self.running) > 1, "a sequence that is longer than all pages was taken in"
                    return False
                break
            self._preempt(victim, lost)
        if needed > 0:
            last = sequence.pages[-1] if sequence.pages else None
            sequence.pages += self.pool.allocate(needed, after=last, room=self._room(sequence))
        step.add(sequence, length)
        return True

    def _preempt(self, sequence: Sequence, lost: list[Sequence]) -> None:
        self.remove(sequence)
        lost.append(sequence)

    def _room(self, sequence: Sequence) -> int:
        """Pages the sequence may still come to need."""
        tokens = len(sequence.token_ids) - sequence.num_scheduled
        if sequence.sampling is not None:
            tokens += min(ROOM_TOKENS, sequence.sampling.max_tokens - sequence.num_generated)
        return self.pool.pages_for(max(0, tokens))


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
