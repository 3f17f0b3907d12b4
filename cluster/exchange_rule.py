"""Which exchange a step uses when the operator leaves it to the engine. One that replays a graph uses the graph's."""

from __future__ import annotations

from cluster.config import ParallelConfig
from cluster.messages import Exchange

ALL_TO_ALL_FROM = 64  # tokens of a step, of all data groups together


def choose_exchange(parallel: ParallelConfig, num_tokens: int) -> Exchange:
    """all_reduce for small steps, where the number of collectives decides (2 a layer against 5); else all_to_all.

    With several data groups all_reduce means that every rank gathers the tokens of all groups, and each group gets its
    own sums back.
    """
    if parallel.ranks == 1:
        return "none"
    if parallel.exchange != "auto":
        return parallel.exchange
    return "all_to_all" if num_tokens >= ALL_TO_ALL_FROM else "all_reduce"
