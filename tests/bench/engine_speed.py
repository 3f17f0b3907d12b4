"""The engine in one process: what it adds to the model, what a cached prefix saves, and transformers beside it.

    python -m tests.bench.engine_speed [--new 48] [--small]

Random weights of the middle size, bfloat16, prompts of 128 tokens, greedy. "outside the model" is the part of the
whole time in which the rank had nothing to compute. transformers: `generate` on one batch, and its own continuous
batching (`generate_batch`), both with its fastest experts.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
import transformers

from cluster.config import EngineConfig, KVConfig, ParallelConfig
from cluster.engine import Engine
from cluster.launch import launch_in_process
from cluster.messages import Request, SamplingParams
from cluster.step_output import StepOutput
from cluster.worker import Prepared, Worker
from tests.bench.step_time import MID, SMALL
from tests.tiny import write_checkpoint

PROMPT = 128
CONCURRENCY = (1, 8, 32)
THREADS = 2


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 300, (PROMPT,), generator=generator).tolist()) for _ in range(count)]


async def answer_all(engine: Engine, texts: Sequence[tuple[int, ...]], new: int) -> float:
    """Seconds until every answer is whole."""
    sampling = SamplingParams(new, temperature=0.0, ignore_eos=True)

    async def answer(number: int, text: tuple[int, ...]) -> None:
        async for _ in engine.generate(Request(str(number), text, sampling)):
            pass

    began = perf_counter()
    await asyncio.gather(*(answer(number, text) for number, text in enumerate(texts)))
    return perf_counter() - began


class Busy:
    """How long the rank computed."""

    def __init__(self) -> None:
        self.seconds = 0.0
        compute = Worker.compute

        def timed(worker: Worker, prepared: Prepared) -> StepOutput:
            began = perf_counter()
            try:
                return compute(worker, prepared)
            finally:
                self.seconds += perf_counter() - began

        Worker.compute = timed  # type: ignore[method-assign]


async def ours(directory: Path, new: int) -> dict[int, float]:
    busy = Busy()
    config = EngineConfig(
        str(directory), dtype="bfloat16", parallel=ParallelConfig(threads_per_rank=THREADS), kv=KVConfig(memory=1 << 30)
    )
    engine = await launch_in_process(config)
    await answer_all(engine, prompts(2, 99), 4)
    speeds = {}
    for count in CONCURRENCY:
        texts = prompts(count, count)
        busy.seconds = 0.0
        seconds = await answer_all(engine, texts, new)
        outside = 1 - busy.seconds / seconds
        again = await answer_all(engine, texts, 1)
        cold = await answer_all(engine, prompts(count, 1000 + count), 1)
        speeds[count] = count * new / seconds
        print(
            f"ours, {count:>2} at once: {speeds[count]:7.1f} tokens/s, {100 * outside:4.1f} % outside the model; "
            f"first token of all prompts cold {cold * 1e3:.0f} ms, cached {again * 1e3:.0f} ms"
        )
    await engine.stop()
    return speeds


def theirs(directory: Path, new: int) -> dict[str, dict[int, float]]:
    transformers.logging.set_verbosity_error()
    model = transformers.MixtralForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    config = transformers.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    speeds: dict[str, dict[int, float]] = {"generate": {}, "continuous batching": {}}
    for count in (2, *CONCURRENCY):  # the first to warm up
        texts = prompts(count, count)
        ids = torch.tensor(texts)
        began = perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        speeds["generate"][count] = count * new / (perf_counter() - began)
        began = perf_counter()
        model.generate_batch([list(text) for text in texts], generation_config=config, persistent_manager=True)
        speeds["continuous batching"][count] = count * new / (perf_counter() - began)
    for of_one in speeds.values():
        del of_one[2]
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--small", action="store_true", help="a smaller model")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        directory = write_checkpoint(Path(name) / "mid", **(SMALL if arguments.small else MID))
        mine = asyncio.run(ours(directory, arguments.new))
        for title, speeds in theirs(directory, arguments.new).items():
            for count, speed in speeds.items():
                print(
                    f"{title}, {count:>2} at once: {speed:7.1f} tokens/s, ours {mine[count] / speed:.2f} times as fast"
                )


if __name__ == "__main__":
    main()
