"""What a rank remembers of its sequences between steps, and how a plan becomes a batch.

plan   chunk of A: 3 tokens, samples | chunk of B: 1 token, samples | text C: 2 tokens, ends
T rows a a a                          b                              c c
R rows     a                          b                                c        those whose hidden states are wanted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cluster.messages import LAST_SAMPLED, SequenceChunk, SequenceStart, StepPlan
from cluster.sampling import MakeMatcher, Sampled
from model.batch import Batch, SequenceSpan
from model.kv_cache import KVCache
from model.pooling import Pool, wanted_rows


@dataclass(slots=True)
class SequenceState:
    start: SequenceStart
    sampled: Sampled | None  # on the rank that samples
    pool: Pool | None
    last_sampled: int = LAST_SAMPLED
    pages: list[int] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)  # the same pages, as (first page, pages)

    def extend(self, new_pages: Sequence[int]) -> None:
        for page in new_pages:
            if self.runs and page == self.runs[-1][0] + self.runs[-1][1]:
                self.runs[-1] = (self.runs[-1][0], self.runs[-1][1] + 1)
            else:
                self.runs.append((page, 1))
        self.pages.extend(new_pages)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows among R of one chunk, and what they are for."""

    seq: int
    rows: range
    samples: bool = False  # the last row gives the next token
    routed: bool = False  # and its caller wants to know its experts
    targets: tuple[int, ...] = ()  # prompt tokens that the first rows are to be judged by
    pools: bool = False  # the rows are part of a text's vector
    ends: bool = False  # and they are its last ones


@dataclass(frozen=True, slots=True)
class StepInput:
    batch: Batch
    wanted: tuple[Wanted, ...]


class RankState:
    """Of the sequences of one data group. `samples`: this rank chooses tokens; the others learn them from it."""

    def __init__(
        self, eos_ids: Sequence[int], vocab_size: int, make_matcher: MakeMatcher, *, group: int, samples: bool
    ) -> None:
        self._eos_ids = eos_ids
        self._vocab_size = vocab_size
        self._make_matcher = make_matcher
        self._group = group
        self._samples = samples
        self.sequences: dict[int, SequenceState] = {}

    def take(self, plan: StepPlan, kv: KVCache, device: torch.device) -> StepInput:
        """Note what the plan says of sequences; the step's input."""
        for number in plan.releases:
            self.sequences.pop(number, None)  # it may be another group's
        for start in plan.starts:
            if start.group == self._group:
                self.sequences[start.seq] = self._begin(start)
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[SequenceSpan] = []
        rows: list[int] = []
        wanted: list[Wanted] = []
        for chunk in plan.chunks:
            state = self.sequences.get(chunk.seq)
            if state is None:
                continue  # another group's: that nobody's chunks are missing is seen from group_tokens
            state.extend(chunk.new_pages)
            first, end = len(token_ids), chunk.start + len(chunk.token_ids)
            spans.append(SequenceSpan(first, len(chunk.token_ids), end, tuple(state.runs)))
            token_ids.extend(state.last_sampled if token == LAST_SAMPLED else token for token in chunk.token_ids)
            positions.extend(range(chunk.start, end))
            stored = chunk.start + chunk.num_stored
            slots.extend([kv.scratch_slot] * chunk.num_stored)
            size, pages = kv.page_size, state.pages
            slots.extend(pages[p // size] * size + p % size for p in range(stored, end))
            wanted_here = _wanted(chunk, state, len(rows))
            if wanted_here is not None:
                rows.extend(range(len(token_ids) - len(wanted_here.rows), len(token_ids)))
                wanted.append(wanted_here)
        token_ids_T, position_T, slot_T, rows_R = (
            torch.tensor(values, dtype=torch.int64, device=device) for values in (token_ids, positions, slots, rows)
        )
        return StepInput(Batch(token_ids_T, position_T, slot_T, tuple(spans), rows_R), tuple(wanted))

    def _begin(self, start: SequenceStart) -> SequenceState:
        sampled = None
        if start.sampling is not None and self._samples:
            sampled = Sampled.start(start, self._eos_ids, self._vocab_size, self._make_matcher)
        return SequenceState(start, sampled, None if start.pooling is None else Pool(start.pooling))


def _wanted(chunk: SequenceChunk, state: SequenceState, first: int) -> Wanted | None:
    """The chunk's rows that are wanted, always its last ones; None: none is."""
    start, length = state.start, len(chunk.token_ids)
    if start.pooling is not None:
        count = len(wanted_rows(start.pooling, range(length), ends_text=chunk.sample))
        return Wanted(chunk.seq, range(first, first + count), pools=True, ends=chunk.sample) if count else None
    assert start.sampling is not None
    routed = start.sampling.return_routing
    if start.sampling.prompt_logprobs is not None and chunk.start < start.num_prompt:
        targets = start.token_ids[chunk.start + 1 : min(chunk.start + length + 1, start.num_prompt)]
        return Wanted(chunk.seq, range(first, first + length), chunk.sample, routed, targets)
    return Wanted(chunk.seq, range(first, first + 1), samples=True, routed=routed) if chunk.sample else None
