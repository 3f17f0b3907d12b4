"""How many pages of KV memory every rank gets. Arithmetic on what the ranks reported after loading.

The ranks of a data group hold the same pages, each its own heads of them; the pages of other groups are others. So an
engine has pages x data pages in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cluster.config import EngineConfig
from cluster.errors import EngineError
from cluster.messages import WorkerFacts

GIB = 1 << 30
CPU_LIMIT = 4 * GIB  # of one replica on one node: a laptop has other things to do


def held_at_once(config: EngineConfig, max_model_len: int, window: int | None) -> int:
    """Tokens that one sequence has in pages at most: with a sliding window those behind it are given back."""
    if window is None:
        return max_model_len
    return min(max_model_len, window + 2 * config.scheduler.max_step_tokens)  # one step is planned ahead


def page_budget(config: EngineConfig, facts: Sequence[WorkerFacts], tokens_per_sequence: int) -> int:
    """Pages that fit on every rank, and no more than max_running sequences at full length could fill.

    They may all be in one data group, once those of the others have ended.

    Raises EngineError when not even one sequence of a max_model_len the operator asked for fits.
    """
    size = config.kv.page_size
    ranks_on = Counter(fact.node for fact in facts)
    fits = min(_bytes_for_pages(config, fact, ranks_on[fact.node]) // fact.bytes_per_page for fact in facts)
    per_sequence = -(-tokens_per_sequence // size)
    needed = per_sequence if config.max_model_len is not None else 1
    if fits < needed:
        page = max(fact.bytes_per_page for fact in facts)
        raise EngineError(
            f"KV memory holds {fits * size} tokens but a sequence of {needed * size} tokens must fit: each rank lacks "
            f"{(needed - fits) * page} bytes; lower max_model_len or raise kv_cache.memory"
        )
    return min(fits, config.scheduler.max_running * per_sequence)


def _bytes_for_pages(config: EngineConfig, fact: WorkerFacts, ranks_on_node: int) -> int:
    if config.kv.memory is not None:
        return config.kv.memory
    if config.device == "cuda":
        return fact.free_bytes * 9 // 10
    return min(CPU_LIMIT, fact.free_bytes // 4) // ranks_on_node
