"""Prompt and decode speed of the model alone, beside transformers with the same weights, in one run.

    python -m tests.bench.model_speed [--threads 2] [--prompt 128] [--steps 32] [--dtype bfloat16] [--cpu-time]

Random weights of a middle size (791 M parameters, 230 M active). Medians, ours and theirs by turns, so that a busy
machine is unfair to both alike; one that has other work to do is best measured with --cpu-time. Theirs is the fastest
of transformers' implementations of experts, each time anew.

The floor is what the machine could do at best, as measured in the same run: every byte of the weights that a step
touches read once, and every multiplication of their elements done, at full speed and at the same time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Protocol

import torch
import transformers

from model.batch import Batch, SequenceSpan
from model.checkpoint import load_weights
from model.config import load_config
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.layers import make_linear
from model.mixtral import Mixtral
from model.moe import Routing
from model.shard import Shard
from model.stages import Stage, Stages

Clock = Callable[[], float]

COLUMNS = ("ours", "eager", "grouped_mm", "batched_mm")  # theirs by how they compute experts
PAGE = 16
STEP_TOKENS = 2048  # as the server steps by default
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "max_position_embeddings": 4096,
}


class Side(Protocol):
    def start(self, tokens_BL: torch.Tensor, room: int) -> None:
        """Forget everything; compute the prompts."""

    def step(self) -> None:
        """Compute what is new and choose each stream's next token."""


class Ours:
    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        config = load_config(directory)
        start, before = perf_counter(), memory("VmRSS")
        forget_peak()
        weights = load_weights(directory, config, Shard(), dtype=dtype, device=torch.device("cpu"))
        seconds, peak = perf_counter() - start, memory("VmHWM") - before
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        print(f"{size / 1e6:.0f} MB loaded in {seconds:.1f} s; memory peaked at {peak / size:.2f} of them")
        self._stages = Stages()
        self.spent: Counter[Stage] = Counter()  # seconds in each stage
        self._model, self._dtype = Mixtral(config, weights, stages=self._stages), dtype
        self._kv = self._memory(0)

    def _memory(self, pages: int) -> KVCache:
        config, cpu = self._model.config, torch.device("cpu")
        return KVCache(config, Shard(), num_pages=pages, page_size=PAGE, dtype=self._dtype, device=cpu)

    def start(self, tokens_BL: torch.Tensor, room: int) -> None:
        B, L = tokens_BL.shape
        self._pages = -(-room // PAGE)
        if self._kv.num_pages < self._pages * B:  # else it is there already, as a server's is
            self._kv = self._memory(self._pages * B)
        self._exchange = OneRank(self._model.config.num_local_experts)
        together = max(1, STEP_TOKENS // L)
        firsts = range(0, B, together)
        self._next = torch.cat([self._compute(tokens_BL[first : first + together], 0, first) for first in firsts])
        self._length = L

    def step(self) -> None:
        self._next = self._compute(self._next, self._length, 0)
        self._length += 1

    def _compute(self, tokens_BL: torch.Tensor, start: int, first_stream: int) -> torch.Tensor:
        """The next token of some streams, of which so many are done already."""
        self._stages.start("build")
        B, L = tokens_BL.shape
        stream_B1 = torch.arange(first_stream, first_stream + B)[:, None]
        position_BL = torch.arange(start, start + L).expand(B, L)
        slot_BL = position_BL + stream_B1 * (self._pages * PAGE)
        runs = [((stream * self._pages, self._pages),) for stream in stream_B1.flatten().tolist()]
        spans = tuple(SequenceSpan(b * L, L, start + L, runs[b]) for b in range(B))
        last_B = torch.arange(L - 1, B * L, L)
        batch = Batch(tokens_BL.flatten(), position_BL.flatten(), slot_BL.flatten(), spans, last_B)
        self.routings: list[Routing] = []
        logits_BV = self._model.logits(self._model.forward(batch, self._kv, self._exchange, self.routings))
        self._stages.start("sample")
        next_B1 = logits_BV.argmax(-1, keepdim=True)
        self.spent.update(self._stages.take())
        return next_B1


class Theirs:
    def __init__(self, model: transformers.MixtralForCausalLM, experts: str) -> None:
        self._model, self._experts = model, experts

    def start(self, tokens_BL: torch.Tensor, room: int) -> None:
        self._cache = transformers.DynamicCache(config=self._model.config)
        self._next = tokens_BL
        # For prompts batched_mm would copy the weights once for every token.
        self._compute("grouped_mm" if self._experts == "batched_mm" else self._experts)

    def step(self) -> None:
        self._compute(self._experts)

    @torch.inference_mode()
    def _compute(self, experts: str) -> None:
        self._model.set_experts_implementation(experts)
        answer = self._model(self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next = answer.logits[:, -1].argmax(-1, keepdim=True)


@dataclass(frozen=True)
class Machine:
    """What is possible here, in bytes and operations per second."""

    bandwidth: float
    speed: float

    @classmethod
    def measured(cls, dtype: torch.dtype, clock: Clock) -> Machine:
        much = torch.ones(1 << 28)  # 1 GiB: no cache holds it
        bandwidth = much.nbytes / median(timed(much.sum, clock) for _ in range(5))
        speed = max(cls._multiplied(N, dtype, clock) for N in (512, 1024, 4096))
        print(f"here {bandwidth / 1e9:.0f} GB/s are read and {speed / 1e9:.0f} GFLOP/s multiplied at best")
        return cls(bandwidth, speed)

    @staticmethod
    def _multiplied(N: int, dtype: torch.dtype, clock: Clock) -> float:
        linear, x_NN = make_linear(torch.ones(N, N, dtype=dtype)), torch.ones(N, N, dtype=dtype)
        return 2 * N**3 / min(timed(partial(linear, x_NN), clock) for _ in range(9))

    def floor(self, ours: Ours, rows: int, streams: int, dtype: torch.dtype) -> float:
        """Seconds of the step just made: of so many rows, and one row of logits for every stream.

        Keys and values are made of all rows, queries of those that are routed: in the last block, of the wanted ones.
        """
        D, F, V = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
        Q, G = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
        query_and_output, key_and_value = 2 * D * D, D * 2 * G * D // Q
        touched = multiplied = 0
        for routing in ours.routings:
            touched += query_and_output + key_and_value + len(routing.expert_SK.unique()) * 3 * D * F
            multiplied += len(routing.expert_SK) * query_and_output + rows * key_and_value
            multiplied += routing.expert_SK.numel() * 3 * D * F
        touched, multiplied = touched + V * D, multiplied + streams * V * D
        return max(touched * dtype.itemsize / self.bandwidth, 2 * multiplied / self.speed)


def memory(field: str) -> int:
    """Bytes, as Linux counts them for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def timed(function: Callable[[], object], clock: Clock) -> float:
    start = clock()
    function()
    return clock() - start


def medians(work: Mapping[str, Callable[[], None]], turns: int, clock: Clock) -> dict[str, float]:
    """Seconds of each side's work, by turns."""
    times = [{name: timed(function, clock) for name, function in work.items()} for _ in range(turns)]
    return {name: median(turn[name] for turn in times) for name in work}


def shown(seconds: dict[str, float], tokens: int, floor: float) -> str:
    """One row: tokens per second of all, ours over the best of theirs, and how much of the floor's both reach."""
    rates = "".join(f"{tokens / seconds[name]:>11.0f}" if name in seconds else f"{'-':>11}" for name in COLUMNS)
    ours, theirs = seconds["ours"], min(seconds[name] for name in seconds if name != "ours")
    return (
        f"{rates}{theirs / ours:>8.2f}{tokens / floor:>8.0f}{100 * floor / ours:>6.0f} %{100 * floor / theirs:>6.0f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, of one thread")
    args = parser.parse_args()
    clock, args.threads = (process_time, 1) if args.cpu_time else (perf_counter, args.threads)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    print(
        f"{args.dtype}, {args.threads} threads, {clock.__name__}, prompts of {args.prompt} tokens, {args.steps} steps"
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).to(dtype).save_pretrained(directory)
        ours = Ours(directory, dtype)
        model = transformers.MixtralForCausalLM.from_pretrained(directory, dtype=dtype)
    machine = Machine.measured(dtype, clock)
    prompt_sides: dict[str, Side] = {"ours": ours} | {name: Theirs(model, name) for name in ("eager", "grouped_mm")}
    batched = Theirs(model, "batched_mm")
    room = args.prompt + args.steps + 2
    print(
        f"{'tokens/s':<12}"
        + "".join(f"{name:>11}" for name in COLUMNS)
        + f"{'ratio':>8}{'floor':>8}{'reached: ours, theirs':>24}"
    )
    spent = {}
    for streams in (1, 8, 32):
        tokens_BL = torch.randint(0, SIZES["vocab_size"], (streams, args.prompt))
        # batched_mm copies the weights of every row's experts: not worth trying for many.
        step_sides = prompt_sides | ({"batched_mm": batched} if streams == 1 else {})
        for side in step_sides.values():  # once for caches and allocators
            side.start(tokens_BL[:, :1], room)
        prompts = {name: partial(side.start, tokens_BL, room) for name, side in prompt_sides.items()}
        ours.spent.clear()
        seconds = medians(prompts, 5, clock)
        spent[f"prefill {streams:>4}"] = dict(ours.spent)
        last = min(streams, max(1, STEP_TOKENS // args.prompt))
        floor = machine.floor(ours, last * args.prompt, last, dtype) * streams / last
        print(f"prefill {streams:>4}{shown(seconds, streams * args.prompt, floor)}", flush=True)
        if streams == 1:
            batched.start(tokens_BL, room)
        ours.spent.clear()
        seconds = medians({name: side.step for name, side in step_sides.items()}, args.steps, clock)
        spent[f"decode  {streams:>4}"] = dict(ours.spent)
        floor = machine.floor(ours, streams, streams, dtype)
        print(f"decode  {streams:>4}{shown(seconds, streams, floor)}", flush=True)
    print("where our time goes, in percent")
    for work, stages in spent.items():
        parts = "  ".join(f"{stage} {100 * time / sum(stages.values()):.1f}" for stage, time in stages.items())
        print(f"{work}  {parts}")


if __name__ == "__main__":
    main()
