"""Where a step's time goes: one process, and two ranks in each layout, transport and exchange, in one run.

    python -m tests.bench.step_time [--small]

Steps of 1, 8, 32 and 64 decoding sequences with 256 tokens of context, and one prompt chunk of 512 tokens, on the
mid-size model (random weights, written to a temporary directory). Times are rank 0's medians in milliseconds;
"exchange" holds every collective with the wait for the other rank. With data groups, sequences are dealt to them in
turn: of one sequence, group 1 has nothing but its experts' work.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from cluster.config import Dtype, EngineConfig, ParallelConfig
from cluster.messages import Exchange, SamplingParams, SequenceChunk, SequenceStart, StepPlan, StepTimes
from cluster.placement import even_placement
from cluster.rendezvous import Transport
from cluster.worker import Worker
from model.comm import Groups
from model.config import load_config
from tests.dist.ranks import run_ranks
from tests.tiny import write_checkpoint

MID: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
}
SMALL = MID | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
PAGE = 16
CONTEXT = 256
REPEAT = 12
STAGES = [field.name for field in fields(StepTimes)]


@dataclass(frozen=True)
class Load:
    name: str
    sequences: int
    chunk: int  # new tokens of each sequence per step


LOADS = (
    Load("decode x1", 1, 1),
    Load("decode x8", 8, 1),
    Load("decode x32", 32, 1),
    Load("decode x64", 64, 1),
    Load("prefill 512", 1, 512),
)


def plans(load: Load, exchange: Exchange, data: int) -> Iterator[StepPlan]:
    """First the contexts, then REPEAT steps of the load, then everything forgotten."""
    step = 0
    seqs = sorted(range(load.sequences), key=lambda seq: seq % data)  # in the order of their groups
    pages = -(-(CONTEXT + load.chunk * (REPEAT + 1)) // PAGE)
    greedy = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    for seq in seqs:
        table = tuple(range(seq // data * pages, (seq // data + 1) * pages))
        tokens = tuple(5 + (seq + i) % 900 for i in range(CONTEXT))
        yield StepPlan(
            step,
            (SequenceChunk(seq, tokens, 0, table, False),),
            (SequenceStart(seq, tokens, len(tokens), greedy, group=seq % data),),
            (),
            exchange,
            _group_tokens([seq], CONTEXT, data),
        )
        step += 1
    tokens = tuple(7 + i % 900 for i in range(load.chunk))
    for repeat in range(REPEAT):
        start = CONTEXT + repeat * load.chunk
        chunks = tuple(SequenceChunk(seq, tokens, start, (), True) for seq in seqs)
        yield StepPlan(step, chunks, (), (), exchange, _group_tokens(seqs, load.chunk, data))
        step += 1


def _group_tokens(seqs: list[int], chunk: int, data: int) -> tuple[int, ...]:
    return tuple(chunk * sum(seq % data == group for seq in seqs) for group in range(data))


def measure(groups: Groups, directory: Path, exchange: Exchange) -> dict[str, list[float]]:
    """Per load, the median seconds of each stage and of the whole step, on this rank."""
    ranks, tensor = groups.world.size, groups.tensor.size
    torch.set_num_threads(2 // ranks)
    config = load_config(directory)
    parallel = ParallelConfig(tensor, ranks // tensor, threads_per_rank=2 // ranks)
    engine = EngineConfig(str(directory), dtype=_dtype(config.dtype), parallel=parallel)
    placement = even_placement(config.num_hidden_layers, config.num_local_experts, ranks)
    worker = Worker(groups.world.rank, engine, placement)
    worker.load()
    table = {}
    for load in LOADS:
        worker.join(groups, 2048)
        rows = []
        for plan in plans(load, exchange, parallel.data):
            began = perf_counter()
            times = worker.step(plan).times
            rows.append([*(getattr(times, stage) for stage in STAGES), perf_counter() - began])
        table[load.name] = [median(column) for column in zip(*rows[-REPEAT + 2 :], strict=True)]
    return table


def _dtype(name: str) -> Dtype:
    assert name in ("float32", "bfloat16")
    return name  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model of seconds instead of a minute")
    arguments = parser.parse_args()
    runs: list[tuple[str, int, int, Exchange, Transport]] = [
        ("1 process", 1, 1, "none", "gloo"),
        ("tensor 2, shared memory, all_reduce", 2, 2, "all_reduce", "shared_memory"),
        ("tensor 2, shared memory, all_to_all", 2, 2, "all_to_all", "shared_memory"),
        ("data 2, shared memory, all_reduce", 2, 1, "all_reduce", "shared_memory"),
        ("data 2, shared memory, all_to_all", 2, 1, "all_to_all", "shared_memory"),
        ("tensor 2, gloo, all_reduce", 2, 2, "all_reduce", "gloo"),
        ("tensor 2, gloo, all_to_all", 2, 2, "all_to_all", "gloo"),
        ("data 2, gloo, all_reduce", 2, 1, "all_reduce", "gloo"),
        ("data 2, gloo, all_to_all", 2, 1, "all_to_all", "gloo"),
    ]
    with tempfile.TemporaryDirectory() as directory:
        # In a child: a process whose torch has started threads must not fork ranks that use several.
        config = SMALL if arguments.small else MID
        checkpoint = run_ranks(1, lambda groups: write_checkpoint(Path(directory) / "mid", **config), timeout_s=300)[0]
        results = []
        for name, size, tensor, exchange, transport in runs:
            ranks = run_ranks(size, measure, checkpoint, exchange, tensor=tensor, transport=transport, timeout_s=300)
            results.append((name, ranks[0]))
    for load in LOADS:
        print(f"\n{load.name:38}" + "".join(f"{stage:>10}" for stage in [*STAGES, "step"]))
        for name, table in results:
            print(f"{name:38}" + "".join(f"{seconds * 1e3:10.2f}" for seconds in table[load.name]))


if __name__ == "__main__":
    main()
