"""What a rank remembers of its sequences between steps, and what of them a step is about.

Preparing a step changes what plans say: which sequences there are, and their pages. Computing it changes what the
model gives: samplers and pools. Preparing n + 1 may run beside computing n, and may forget sequences that n is still
about: so whatever computing needs goes with the step, and nothing is looked up here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.messages import SequenceChunk, SequenceStart, StepPlan
from cluster.sampling import MakeMatcher, Sampled
from cluster.step_input import Rows, StepMemory, StepNumbers
from model.kv_cache import KVCache
from model.pooling import Pool, wanted_rows


@dataclass(slots=True)
class SequenceState:
    """Preparing extends the pages; computing changes sampler and pool."""

    start: SequenceStart
    seat: int  # where the device keeps what it sampled last
    sampled: Sampled | None  # on the rank that samples
    pool: Pool | None
    pages: list[int] = field(default_factory=list)
    runs: tuple[tuple[int, int], ...] = ()  # the same pages, as (first page, pages)

    def extend(self, new_pages: Sequence[int]) -> None:
        runs = list(self.runs)
        for page in new_pages:
            if runs and page == sum(runs[-1]):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((page, 1))
        self.runs = tuple(runs)
        self.pages.extend(new_pages)

    @property
    def routed(self) -> bool:
        """Its caller wants to know the experts of what is sampled."""
        return self.start.sampling is not None and self.start.sampling.return_routing

    def wanted(self, chunk: SequenceChunk) -> int:
        """How many rows of the chunk are wanted: always its last ones."""
        start = self.start
        if start.sampling is None:
            assert start.pooling is not None
            return len(wanted_rows(start.pooling, range(len(chunk.token_ids)), ends_text=chunk.sample))
        if start.sampling.prompt_logprobs is not None and chunk.start < start.num_prompt:
            return len(chunk.token_ids)
        return 1 if chunk.sample else 0

    def targets(self, chunk: SequenceChunk) -> tuple[int, ...]:
        """Prompt tokens that the chunk's first rows are to be judged by."""
        start, first = self.start, chunk.start + 1
        if start.sampling is None or start.sampling.prompt_logprobs is None:
            return ()
        return start.token_ids[first : min(first + len(chunk.token_ids), start.num_prompt)]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows among R of one chunk that are wanted for more than sampling from the last."""

    state: SequenceState
    rows: range
    targets: tuple[int, ...] = ()  # prompt tokens that the first rows are to be judged by
    ends: bool = False  # of a text's vector: these are its last rows


@dataclass(frozen=True, slots=True)
class StepInput:
    """All of a step but what the one before it gives."""

    numbers: StepNumbers
    states: list[SequenceState]  # of every chunk
    sampled: list[SequenceState]
    sampled_rows: list[int]  # of each of these, its row among R
    judged: list[Wanted]
    pooled: list[Wanted]


class RankState:
    """Of the sequences of one data group. `samples`: this rank chooses tokens; the others learn them from it."""

    def __init__(
        self,
        eos_ids: Sequence[int],
        vocab_size: int,
        make_matcher: MakeMatcher,
        kv: KVCache,
        *,
        seats: int,
        max_tokens: int,
        group: int,
        samples: bool,
    ) -> None:
        self._eos_ids = eos_ids
        self._vocab_size = vocab_size
        self._make_matcher = make_matcher
        self._group = group
        self._samples = samples
        self._page_size = kv.page_size
        self._memories = [StepMemory(max_tokens, kv.scratch_slot) for _ in range(2)]
        self._free_seats = list(range(seats))
        self._sequences: dict[int, SequenceState] = {}

    def take(self, plan: StepPlan) -> StepInput:
        """Note what the plan says of sequences; the step's input, in the memory of the step before the last."""
        for number in plan.releases:
            released = self._sequences.pop(number, None)
            if released is not None:  # else it is another group's
                self._free_seats.append(released.seat)
        for start in plan.starts:
            if start.group == self._group:
                assert start.seq not in self._sequences, "it was not released"
                self._sequences[start.seq] = self._begin(start)
        rows = Rows(self._page_size)
        states: list[SequenceState] = []
        sampled: list[SequenceState] = []
        sampled_rows: list[int] = []
        judged: list[Wanted] = []
        pooled: list[Wanted] = []
        for chunk in plan.chunks:
            state = self._sequences.get(chunk.seq)
            if state is None:
                continue  # another group's: that nobody's chunks are missing is seen from group_tokens
            states.append(state)
            if chunk.new_pages:
                state.extend(chunk.new_pages)
            rows.add(chunk, state.seat, state.pages, state.runs)
            first, wanted = len(rows.wanted), state.wanted(chunk)
            if not wanted:
                continue
            rows.want(wanted)
            if state.pool is not None:
                pooled.append(Wanted(state, range(first, first + wanted), ends=chunk.sample))
                continue
            if targets := state.targets(chunk):
                judged.append(Wanted(state, range(first, first + wanted), targets))
            if chunk.sample:
                sampled.append(state)
                sampled_rows.append(first + wanted - 1)
        self._memories.reverse()
        numbers = self._memories[0].write(rows, sampled_rows, [state.seat for state in sampled])
        return StepInput(numbers, states, sampled, sampled_rows, judged, pooled)

    def _begin(self, start: SequenceStart) -> SequenceState:
        sampled = None
        if start.sampling is not None and self._samples:
            sampled = Sampled.start(start, self._eos_ids, self._vocab_size, self._make_matcher)
        pool = None if start.pooling is None else Pool(start.pooling)
        return SequenceState(start, self._free_seats.pop(), sampled, pool)
