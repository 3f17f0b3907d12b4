"""Which layouts a number of devices allows, what each holds and how fast it could be at best. Arithmetic alone.

`mixtral-serve plan` prints it. The KV memory is computed by the function that sizes it at a real start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from cluster.config import EngineConfig, ParallelConfig
from cluster.errors import EngineError
from cluster.footprint import Footprint, MatrixBytes, footprint
from cluster.memory import held_at_once, page_budget
from cluster.messages import WorkerFacts
from cluster.step_floor import Hardware, step_floor
from model.config import MixtralConfig
from model.errors import ModelError

PREFILL_TOKENS = 2048
# What the driver, libraries and the allocator keep of a GPU before the first weight.
RESERVED_BYTES = {"cuda": 640 << 20, "cpu": 0}


@dataclass(frozen=True, slots=True)
class Layout:
    """So many replicas, each of so many ranks."""

    replicas: int
    parallel: ParallelConfig

    @property
    def devices(self) -> int:
        return self.replicas * self.parallel.ranks

    @property
    def lost_with_one(self) -> float:
        """Share of all capacity that pauses when one device dies."""
        return 1 / self.replicas


@dataclass(frozen=True, slots=True)
class Workload:
    context: int  # tokens of each sequence
    itemsize: int  # of activations, keys and values
    matrix_bytes: MatrixBytes


@dataclass(frozen=True, slots=True)
class Estimate:
    layout: Layout
    footprint: Footprint
    lacks: int  # bytes that a device is short of; 0: it fits
    kv_tokens: int = 0  # of one replica
    sequences: int = 0  # of full context that one replica holds at once, at most max_running
    one_s: float = 0.0  # a step with one sequence
    full_s: float = 0.0  # a step with all of them
    prefill_s: float = 0.0  # a step with one prompt of PREFILL_TOKENS

    @property
    def tokens_per_s(self) -> float:
        """Decoded by all replicas together."""
        return self.layout.replicas * self.sequences / self.full_s if self.sequences else 0.0


def layouts(model: MixtralConfig, devices: int) -> Iterable[Layout]:
    """Every way to use all devices: replicas, tensor groups, data groups; experts whole or cut."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    for replicas, tensor in product(sizes, sizes):
        if devices % (replicas * tensor):
            continue
        data = devices // (replicas * tensor)
        ranks = tensor * data
        for expert in sorted({ranks, 1}, reverse=True):
            if ranks > 1 and expert == 1 and data > 1:
                continue  # every rank would compute a part of every token of every group
            yield Layout(replicas, ParallelConfig(tensor=tensor, data=data, expert=expert))


def estimate(
    model: MixtralConfig, layout: Layout, hardware: Hardware, config: EngineConfig, workload: Workload
) -> Estimate:
    """Raises ModelError if the model cannot be cut this way."""
    parallel = layout.parallel
    config = replace(config, parallel=parallel)
    holds = footprint(
        model,
        parallel,
        itemsize=workload.itemsize,
        matrix_bytes=workload.matrix_bytes,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_running=config.scheduler.max_running,
    )
    on_one_device = parallel.ranks if config.device == "cpu" else 1
    beside = holds.beside if config.device == "cuda" else 0
    free = hardware.memory - RESERVED_BYTES[config.device] - holds.weights * on_one_device - beside
    if free <= 0:
        return Estimate(layout, holds, lacks=-free)
    try:
        pages = page_budget(
            config,
            [_facts(config, holds, free)] * parallel.ranks,
            held_at_once(config, workload.context, model.sliding_window),
        )
    except EngineError:
        return Estimate(layout, holds, lacks=holds.kv_per_token * workload.context)
    tokens = pages * config.kv.page_size * parallel.data
    held = min(workload.context, model.sliding_window or workload.context)
    sequences = min(tokens // held, config.scheduler.max_running)

    def seconds(sequences: int, new_tokens: int, context: int) -> float:
        floor = step_floor(
            model, parallel, holds, hardware,
            sequences=sequences, new_tokens=new_tokens, context=context, itemsize=workload.itemsize,
        )  # fmt: skip
        return floor.total

    return Estimate(
        layout,
        holds,
        0,
        tokens,
        sequences,
        seconds(1, 1, held),
        seconds(sequences, 1, held) if sequences else 0.0,
        seconds(1, PREFILL_TOKENS, PREFILL_TOKENS),
    )


def estimates(
    model: MixtralConfig, devices: int, hardware: Hardware, config: EngineConfig, workload: Workload
) -> list[Estimate]:
    found = []
    for layout in layouts(model, devices):
        try:
            found.append(estimate(model, layout, hardware, config, workload))
        except ModelError:
            continue  # heads or a group of quantised weights do not divide
    return found


@dataclass(frozen=True, slots=True)
class Recommendation:
    latency: Estimate  # the quickest token for one user
    throughput: Estimate  # the most tokens for many
    failure: Estimate  # the least that stops when one device dies


def recommend(fitting: Sequence[Estimate]) -> Recommendation:
    """Of layouts that hold at least one sequence. Ties go to the simpler one: fewer ranks."""
    assert fitting
    return Recommendation(
        latency=min(fitting, key=lambda e: (round(e.one_s, 5), e.layout.parallel.ranks)),
        throughput=max(fitting, key=lambda e: (e.tokens_per_s, -e.layout.parallel.ranks)),
        failure=min(fitting, key=lambda e: (e.layout.lost_with_one, -e.tokens_per_s)),
    )


def _facts(config: EngineConfig, holds: Footprint, free: int) -> WorkerFacts:
    return WorkerFacts(
        pid=0,
        node="planned",
        device=config.device,
        weight_bytes=holds.weights,
        load_seconds=0.0,
        bytes_per_page=holds.kv_per_token * config.kv.page_size,
        free_bytes=free,
    )
