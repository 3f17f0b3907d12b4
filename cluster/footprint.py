"""What one rank of a layout has to hold: bytes of weights, of each token's keys and values, of a step's workspace.

Arithmetic on the model's shape alone: nothing is read and no device is asked. `mixtral-serve plan` compares layouts
with it, and a rank refuses by it before it reads what cannot fit.

Rank 0 stands for all: what does not divide evenly goes to the first ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.config import ParallelConfig
from model.comm import split_rows
from model.config import MixtralConfig
from model.quantization import Mode, stored_bytes
from model.shard import Shard

# Bytes that a matrix of so many rows and columns takes as it is kept.
MatrixBytes = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class Footprint:
    attention: int  # projections of all blocks
    experts: int  # all slots of all blocks
    one_expert: int  # this rank's slice of it
    embedding: int
    head: int  # of a language model, tied or not: it is kept in the layout that multiplies
    other: int  # norms and routers
    kv_per_token: int
    workspace: int  # an upper bound of what a full step needs beside them

    @property
    def weights(self) -> int:
        return self.attention + self.experts + self.embedding + self.head + self.other


def matrix_bytes(mode: Mode | None, itemsize: int) -> MatrixBytes:
    """Of matrices that are quantised, or (None) kept in items of this size."""
    return lambda height, width: height * width * itemsize if mode is None else stored_bytes(mode, height, width)


def slots_per_rank(num_experts: int, parallel: ParallelConfig) -> int:
    return -(-num_experts // (parallel.ranks // parallel.expert_slices)) + parallel.spare_slots


def footprint(
    model: MixtralConfig,
    parallel: ParallelConfig,
    *,
    itemsize: int,  # of activations, keys and values, and of the matrices that are never quantised
    matrix_bytes: MatrixBytes,
    max_step_tokens: int,
    max_running: int,
) -> Footprint:
    """Raises ModelError if attention cannot be cut this way."""
    D, layers = model.hidden_size, model.num_hidden_layers
    queries, keys = (len(heads) * model.head_dim for heads in model.head_slices(Shard(tensor_size=parallel.tensor)))
    F = split_rows(model.intermediate_size, parallel.expert_slices)[0]
    V = split_rows(model.vocab_size, parallel.tensor)[0]
    one_expert = matrix_bytes(2 * F, D) + matrix_bytes(D, F)
    slots = slots_per_rank(model.num_local_experts, parallel)
    # The widest moment of a block: rows on their way through the experts, or query, key and value heads.
    rows = max_step_tokens * model.num_experts_per_tok
    widest = max(rows * (2 * D + 2 * F), max_step_tokens * (2 * queries + 2 * keys))
    return Footprint(
        attention=layers * (matrix_bytes(queries + 2 * keys, D) + matrix_bytes(D, queries)),
        experts=layers * slots * one_expert,
        one_expert=one_expert,
        embedding=V * D * itemsize,
        head=V * D * itemsize if model.is_language_model else len(model.labels) * D * itemsize,
        other=(layers * (2 * D + model.num_local_experts * D) + D) * itemsize,
        kv_per_token=2 * layers * keys * itemsize,
        workspace=(3 * max_step_tokens * D + widest) * itemsize + 2 * max_running * model.vocab_size * 4,
    )
