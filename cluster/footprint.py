"""What one rank of a layout has to hold: bytes of weights, of each token's keys and values, of what steps need besides.

Arithmetic on the model's shape alone: nothing is read and no device is asked. `mixtral-serve plan` compares layouts
with it, and a rank refuses by it before it reads what cannot fit.

Rank 0 stands for all: what does not divide evenly goes to the first ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.config import ParallelConfig
from cluster.graph_ladder import graph_exchange, graph_sizes
from model.comm import split_rows
from model.config import MixtralConfig
from model.modes import Mode, stored_bytes
from model.shard import Shard

# Bytes that a matrix of so many rows and columns takes as it is kept.
MatrixBytes = Callable[[int, int], int]

# On the safe side, by what others report: nobody has measured them here.
COMMUNICATOR_BYTES = 1 << 30  # NCCL's buffers for one group of ranks
KERNELS_PER_LAYER = 20  # collectives included
KERNEL_BYTES = 16 << 10  # that the driver keeps of each in a graph
SPLITS = 8  # of a text's keys, where there are many texts (model/kernels/paged_decode.py)


@dataclass(frozen=True, slots=True)
class Footprint:
    attention: int  # projections of all blocks
    experts: int  # all slots of all blocks
    one_expert: int  # this rank's slice of it
    embedding: int
    head: int  # of a language model, tied or not: it is kept in the layout that multiplies
    other: int  # norms and routers
    kv_per_token: int
    # Upper bounds of what a GPU needs beside these.
    workspace: int  # a full step
    graphs: int  # decode steps, captured
    communicators: int  # the other ranks

    @property
    def weights(self) -> int:
        return self.attention + self.experts + self.embedding + self.head + self.other

    @property
    def beside(self) -> int:
        """Of a GPU: what is left beside weights and pages. On a CPU what is left over is plenty."""
        return self.workspace + self.graphs + self.communicators


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
        graphs=_graphs(model, parallel, itemsize, max_running, queries=queries, keys=keys, F=F),
        communicators=COMMUNICATOR_BYTES * ((parallel.ranks > 1) + (1 < parallel.tensor < parallel.ranks)),
    )


def _graphs(
    model: MixtralConfig, parallel: ParallelConfig, itemsize: int, max_running: int, *, queries: int, keys: int, F: int
) -> int:
    """All share the memory that the largest computes in; each keeps what it gives, and the driver its kernels."""
    if graph_exchange(parallel) == "all_to_all":
        return 0
    D, sizes = model.hidden_size, graph_sizes(max_running)
    tokens = max_running * parallel.data  # every group is padded to as many rows
    experts = tokens * model.num_experts_per_tok * (F * itemsize + D * 4)
    attention = max_running * ((2 * queries + 2 * keys) * itemsize + SPLITS * queries * 4)
    computing = 3 * tokens * D * itemsize + tokens * D * 4 + max(experts, attention)
    kernels = len(sizes) * model.num_hidden_layers * KERNELS_PER_LAYER * KERNEL_BYTES
    return computing + sum(sizes) * D * itemsize + kernels
