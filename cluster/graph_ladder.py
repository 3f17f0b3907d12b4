"""Which decode steps are replayed as captured graphs, and which graph is to be captured next.

    sizes      1   2   4   8   16  ...  256     rows of each data group
    captured                   8   16  ...      the largest first, which holds all steps; one a step
    a step of 5 single tokens names 8           all ranks replay it, whatever of it is theirs

All ranks capture what a plan says, in the order of plans; so a size that was captured on one is on all. While there is
nothing else to do captures follow one another; a server that is never idle has one now and then, between its steps.
Pure: the time is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from cluster.config import EngineConfig, ParallelConfig
from cluster.messages import Exchange, StepPlan

BUSY_EVERY_S = 10.0  # streams pause for a part of a second
MAX_FAILURES = 2  # the first may have been somebody's death
BAR = 20  # characters


class GraphLadder:
    """Of one engine; written by its thread alone."""

    def __init__(self, sizes: Sequence[int], exchange: Exchange) -> None:
        """`exchange`: over which the graphs run. No sizes: there are no graphs."""
        self._sizes = sorted(sizes)
        self.exchange = exchange
        self._captured: set[int] = set()
        self._routed: set[int] = set()  # sequences that want to know their experts, which no graph tells
        self._failures = 0
        self._last = -inf  # when a graph was captured, or all were lost

    @property
    def complete(self) -> bool:
        return len(self._captured) == len(self._sizes)

    def due(self, now: float, *, idle: bool) -> int | None:
        """The graph to be captured now."""
        if self.complete or not (idle or now - self._last >= BUSY_EVERY_S):
            return None
        return next(rows for rows in reversed(self._sizes) if rows not in self._captured)

    def captured(self, rows: int, now: float) -> None:
        """On all ranks."""
        self._captured.add(rows)
        self._last = now
        if self.complete:
            self._failures = 0

    def rows_for(self, plan: StepPlan) -> int:
        """The graph for a step that is about to be handed out; 0: none fits. For every step, in their order."""
        self._routed.difference_update(plan.releases)
        self._routed.update(s.seq for s in plan.starts if s.sampling is not None and s.sampling.return_routing)
        if not self._captured:
            return 0
        if not all(len(chunk.token_ids) == 1 and chunk.seq not in self._routed for chunk in plan.chunks):
            return 0
        tokens = max(plan.group_tokens or (plan.num_tokens,))
        return min((rows for rows in self._captured if rows >= tokens > 0), default=0)

    def drop(self, now: float) -> None:
        """Experts sit elsewhere: the ranks' graphs are of where they were."""
        self._captured.clear()
        self._last = now

    def forget(self, now: float) -> None:
        """The ranks were formed anew, and are told of all sequences again."""
        self.drop(now)
        self._routed.clear()

    def failed(self) -> bool:
        """A capture did. Whether it is tried again, when the ranks are back."""
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            self._sizes = []
        return bool(self._sizes)

    def progress(self) -> str:
        done, total = len(self._captured), len(self._sizes)
        filled = BAR * done // total
        return f"[{'#' * filled}{'.' * (BAR - filled)}] {done} of {total}"


def ladder_for(config: EngineConfig) -> GraphLadder:
    exchange = graph_exchange(config.parallel)
    has_graphs = config.device == "cuda" and exchange != "all_to_all"
    return GraphLadder(graph_sizes(config.scheduler.max_running) if has_graphs else (), exchange)


def graph_exchange(parallel: ParallelConfig) -> Exchange:
    """That of decode steps where there are graphs. all_to_all asks the device for counts, so it cannot be captured."""
    if parallel.ranks == 1:
        return "none"
    return "all_to_all" if parallel.exchange == "all_to_all" else "all_reduce"


def graph_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, 8, then every 16: padding costs attention a little, and experts nothing."""
    return [*(size for size in (1, 2, 4, 8) if size < max_rows), *range(16, max_rows, 16), max_rows]
