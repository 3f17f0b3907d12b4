"""Where a step's time goes: one process, and two ranks over each transport and exchange, in one run.

    python -m tests.bench.step_time [--small]

Steps of 1, 8 and 32 decoding sequences with 256 tokens of context, and one prompt chunk of 512 tokens, on the
mid-size model (random weights, written to a temporary directory). Times are rank 0's medians in milliseconds;
"exchange" holds every collective with the wait for the other rank.
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
from cluster.process_group import Transport
from cluster.worker import Worker
from model.comm import Comm
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


LOADS = (Load("decode x1", 1, 1), Load("decode x8", 8, 1), Load("decode x32", 32, 1), Load("prefill 512", 1, 512))


def plans(load: Load, exchange: Exchange) -> Iterator[StepPlan]:
    """First the contexts, then REPEAT steps of the load, then everything forgotten."""
    step = 0
    pages = -(-(CONTEXT + load.chunk * (REPEAT + 1)) // PAGE)
    greedy = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    for seq in range(load.sequences):
        table = tuple(range(seq * pages, (seq + 1) * pages))
        tokens = tuple(5 + (seq + i) % 900 for i in range(CONTEXT))
        yield StepPlan(
            step,
            (SequenceChunk(seq, tokens, 0, table, False),),
            (SequenceStart(seq, tokens, len(tokens), greedy),),
            (),
            exchange,
        )
        step += 1
    tokens = tuple(7 + i % 900 for i in range(load.chunk))
    for repeat in range(REPEAT):
        start = CONTEXT + repeat * load.chunk
        chunks = tuple(SequenceChunk(seq, tokens, start, (), True) for seq in range(load.sequences))
        yield StepPlan(step, chunks, (), (), exchange)
        step += 1


def measure(comm: Comm, directory: Path, exchange: Exchange) -> dict[str, list[float]]:
    """Per load, the median seconds of each stage and of the whole step, on this rank."""
    torch.set_num_threads(2 // comm.size)
    config = load_config(directory)
    parallel = ParallelConfig(tensor=comm.size, threads_per_rank=2 // comm.size)
    engine = EngineConfig(str(directory), dtype=_dtype(config.dtype), parallel=parallel)
    worker = Worker(comm.rank, engine, even_placement(config.num_hidden_layers, config.num_local_experts, comm.size))
    worker.load()
    table = {}
    for load in LOADS:
        worker.join(comm, 2048)
        rows = []
        for plan in plans(load, exchange):
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
    runs: list[tuple[str, int, Exchange, Transport]] = [
        ("1 process", 1, "none", "gloo"),
        ("2 ranks, shared memory, all_reduce", 2, "all_reduce", "shared_memory"),
        ("2 ranks, shared memory, all_to_all", 2, "all_to_all", "shared_memory"),
        ("2 ranks, gloo, all_reduce", 2, "all_reduce", "gloo"),
        ("2 ranks, gloo, all_to_all", 2, "all_to_all", "gloo"),
    ]
    with tempfile.TemporaryDirectory() as directory:
        # In a child: a process whose torch has started threads must not fork ranks that use several.
        config = SMALL if arguments.small else MID
        checkpoint = run_ranks(1, lambda comm: write_checkpoint(Path(directory) / "mid", **config), timeout_s=300)[0]
        results = []
        for name, size, exchange, transport in runs:
            ranks = run_ranks(size, measure, checkpoint, exchange, transport=transport, timeout_s=300)
            results.append((name, ranks[0]))
    for load in LOADS:
        print(f"\n{load.name:38}" + "".join(f"{stage:>10}" for stage in [*STAGES, "step"]))
        for name, table in results:
            print(f"{name:38}" + "".join(f"{seconds * 1e3:10.2f}" for seconds in table[load.name]))


if __name__ == "__main__":
    main()
