"""The least time a step can take on given hardware: bytes over bandwidth, operations over rate, and the links.

No kernel reaches it; what does better than it in a measurement was measured wrongly. Arithmetic alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import ParallelConfig
from cluster.exchange_rule import ALL_TO_ALL_FROM
from cluster.footprint import Footprint
from model.config import MixtralConfig
from model.shard import Shard


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device and its way to the others. Bytes, bytes a second, operations a second, seconds."""

    name: str
    memory: int
    bandwidth: float
    operations: float  # of dense matrix products in the activations' precision
    link: float  # to the other devices of its node, one direction
    link_latency: float = 8e-6  # of one small collective


@dataclass(frozen=True, slots=True)
class StepFloor:
    """Seconds. Memory and arithmetic overlap at best; a block waits for its collectives."""

    memory: float
    operations: float
    link: float

    @property
    def total(self) -> float:
        return max(self.memory, self.operations) + self.link


def step_floor(
    model: MixtralConfig,
    parallel: ParallelConfig,
    footprint: Footprint,
    hardware: Hardware,
    *,
    sequences: int,  # over all data groups
    new_tokens: int,  # of each: 1 when decoding
    context: int,  # tokens each one has in pages
    itemsize: int,
) -> StepFloor:
    """A step of one replica, with experts chosen evenly and sequences dealt evenly."""
    tokens, groups, ranks = sequences * new_tokens, parallel.data, parallel.ranks
    group_tokens, group_sequences = -(-tokens // groups), -(-sequences // groups)
    untouched = (1 - model.num_experts_per_tok / model.num_local_experts) ** tokens
    # A block waits for its busiest rank, which reads one expert at the least.
    experts = max(footprint.experts * (1 - untouched), model.num_hidden_layers * footprint.one_expert)
    read = footprint.attention + footprint.head + footprint.other + experts
    read += group_sequences * context * footprint.kv_per_token
    return StepFloor(
        memory=read / hardware.bandwidth,
        operations=_operations(model, parallel, group_tokens, group_sequences, tokens, context) / hardware.operations,
        link=0.0 if ranks == 1 else _link_seconds(model, parallel, hardware, tokens, itemsize),
    )


def _operations(
    model: MixtralConfig, parallel: ParallelConfig, group_tokens: int, group_sequences: int, tokens: int, context: int
) -> float:
    """Of one rank: two for each weight and token, and for each pair of tokens that attention compares."""
    D, C = model.hidden_size, model.head_dim
    heads, kv_heads = map(len, model.head_slices(Shard(tensor_size=parallel.tensor)))
    attention = group_tokens * D * C * (2 * heads + 2 * kv_heads)
    seen = context - (group_tokens / max(1, group_sequences) - 1) / 2  # a prompt's tokens see half of it on average
    scores = 2 * group_tokens * heads * C * seen
    experts = tokens * model.num_experts_per_tok * 3 * D * model.intermediate_size / parallel.ranks
    head = group_sequences * D * model.vocab_size / parallel.tensor
    return 2 * (model.num_hidden_layers * (attention + scores + experts) + head)


def _link_seconds(
    model: MixtralConfig, parallel: ParallelConfig, hardware: Hardware, tokens: int, itemsize: int
) -> float:
    """Of one rank, in units of all tokens' rows: what it sends to sum attention and to bring rows to their experts."""
    n, K = parallel.ranks, model.num_experts_per_tok
    within = 2 * (parallel.tensor - 1) / parallel.tensor / parallel.data  # attention's sum, inside a tensor group
    if parallel.exchange == "all_reduce" or (parallel.exchange == "auto" and tokens < ALL_TO_ALL_FROM):
        collectives, rows = (2 if parallel.data == 1 else 4), within + 2 * (n - 1) / n
    else:
        collectives = 5 if parallel.tensor > 1 else 3
        rows = within + 2 * K * parallel.expert_slices / n * (n - 1) / n
    row = model.hidden_size * itemsize
    return model.num_hidden_layers * (collectives * hardware.link_latency + rows * tokens * row / hardware.link)
