"""What HTTP and Serve add to the bare engine: time to the first token, and time per token.

    python -m tests.bench.http_latency [--new 64] [--rounds 5]

The demo model on one rank, which is an actor each time: first asked in the process that has the engine, then over HTTP
through Serve's own proxy, then with direct streaming (HAProxy). Clients are bare sockets in a process of their own.
Then a model that takes 5 ms for a step, whatever it holds, with 256 streams: bare, and over HTTP from one process,
where the engine's thread and the event loop share an interpreter. The gap is what a process of the
loop's own could save.

Everything runs in a network namespace of its own, since HAProxy also listens where nobody told it to.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, sleep

import uvicorn

from cluster.config import EngineConfig, KVConfig, SchedulerConfig
from cluster.engine import Engine
from cluster.launch import launch
from cluster.messages import Request, SamplingParams, StepPlan, StepResult, StepTimes
from cluster.placement import even_placement
from deployments.api import create_app
from deployments.layout import Machine
from deployments.live import Live
from deployments.local_ray import own_ray
from deployments.resolve import Resolved, resolve
from deployments.settings import load
from model.config import load_config
from model.tokenizer import load_tokenizer
from tests.e2e.direct_streaming import raise_loopback
from tests.e2e.server import free_port, mixtral_serve
from tests.fake_group import FakeGroup

CONCURRENCY = (1, 8, 32)
PROMPT = list(range(300, 364))
STEP_S, STREAMS = 0.005, 256
DIRECT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


@dataclass(frozen=True)
class Times:
    """Medians over streams and rounds, in milliseconds; tokens per second of all streams together."""

    first: float
    each: float
    per_second: float


Stream = Callable[[int], Awaitable[list[float]]]  # the number of a stream -> when each of its tokens came


async def measured(stream: Stream, streams: int, rounds: int) -> Times:
    firsts: list[float] = []
    gaps: list[float] = []
    tokens, seconds = 0, 0.0
    for turn in range(rounds):
        began = perf_counter()
        arrivals = await asyncio.gather(*(stream(turn * streams + number) for number in range(streams)))
        seconds += perf_counter() - began
        tokens += sum(map(len, arrivals))
        firsts += [times[0] - began for times in arrivals]
        gaps += [(times[-1] - times[0]) / (len(times) - 1) for times in arrivals]
    return Times(statistics.median(firsts) * 1e3, statistics.median(gaps) * 1e3, tokens / seconds)


def from_engine(engine: Engine, new: int) -> Stream:
    async def stream(number: int) -> list[float]:
        # A prompt of its own each time: no prefix is cached in any of the ways that are compared.
        request = Request(str(number), (*PROMPT, 3 + number % 250), SamplingParams(new, temperature=0, ignore_eos=True))
        return [perf_counter() async for event in engine.generate(request) for _ in event.token_ids]

    return stream


def over_http(port: int, model: str, new: int) -> Stream:
    async def stream(number: int) -> list[float]:
        fields = {"model": model, "prompt": [*PROMPT, 3 + number % 250], "max_tokens": new, "temperature": 0}
        body = json.dumps(fields | {"ignore_eos": True, "stream": True, "return_token_ids": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: "
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        times: list[float] = []
        while b"data: [DONE]" not in (line := await reader.readline()):
            assert line, "the server closed early"
            times += [perf_counter()] * line.startswith(b"data: {")
        writer.close()
        return times

    return stream


async def client(port: int, model: str, new: int, rounds: int, concurrency: Sequence[int]) -> list[Times]:
    stream = over_http(port, model, new)
    await measured(stream, max(concurrency), 1)
    return [await measured(stream, streams, rounds) for streams in concurrency]


def client_process(port: int, model: str, new: int, rounds: int, concurrency: Sequence[int]) -> list[Times]:
    arguments = json.dumps([port, model, new, rounds, list(concurrency)])
    command = [sys.executable, "-m", "tests.bench.http_latency", "--client", arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [Times(**times) for times in json.loads(done.stdout)]


def demo() -> Resolved:
    return resolve(load({"kv_cache": {"prefix_caching": False}}), Machine(os.cpu_count() or 1, 0))


async def bare(new: int, rounds: int) -> list[Times]:
    engine = await launch(demo().engine)
    try:
        stream = from_engine(engine, new)
        await measured(stream, max(CONCURRENCY), 1)
        return [await measured(stream, streams, rounds) for streams in CONCURRENCY]
    finally:
        await engine.stop()


def served(new: int, rounds: int, environment: dict[str, str]) -> list[Times]:
    options = ("--set", "kv_cache.prefix_caching=false", "--set", "access_log=null")
    server = mixtral_serve(*options, environment=environment)
    try:
        server.wait_for("answers at")
        return client_process(int(server.url.rpartition(":")[2]), "mixtral-demo", new, rounds, CONCURRENCY)
    finally:
        server.close()


class PacedGroup(FakeGroup):
    """Takes its time for every step, one after the other, and samples the same token."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages, page_size)
        self._thread = ThreadPoolExecutor(1)

    def step(self, plan: StepPlan) -> Future[StepResult]:  # type: ignore[override]
        return self._thread.submit(self._paced, plan)

    def _paced(self, plan: StepPlan) -> StepResult:
        sleep(STEP_S)
        seqs = tuple(chunk.seq for chunk in plan.chunks if chunk.sample)
        return StepResult(plan.step, seqs, (400,) * len(seqs), StepTimes())


@asynccontextmanager
async def paced() -> AsyncIterator[tuple[Engine, Resolved]]:
    resolved = demo()
    directory = Path(resolved.engine.model_path)
    kv = KVConfig(page_size=16, prefix_caching=False)
    config = EngineConfig(resolved.engine.model_path, kv=kv, scheduler=SchedulerConfig(STREAMS, 1 << 15, STREAMS))
    model = load_config(directory)
    placement = even_placement(model.num_hidden_layers, model.num_local_experts, 1)
    group = PacedGroup(STREAMS * 64, kv.page_size)
    engine = Engine(config, model, group, placement, group.start(), 1024, load_tokenizer(directory))
    yield engine, resolved
    await engine.stop()


async def paced_bare(new: int) -> Times:
    async with paced() as (engine, _):
        return await measured(from_engine(engine, new), STREAMS, 2)


async def paced_over_http(new: int) -> Times:
    async with paced() as (engine, resolved):
        port = free_port()
        app = create_app(engine, resolved, Live(resolved.settings, {}))
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        [times] = await asyncio.to_thread(client_process, port, "mixtral-demo", new, 2, [STREAMS])
        server.should_exit = True
        await serving
        return times


def report(rows: dict[str, list[Times]], of_paced: dict[str, Times]) -> None:
    widths = "  ".join(f"{count:>8}" for count in CONCURRENCY)
    print(f"{'streams':<28}{'first token, ms':<28}  {'each next token, ms'}\n{'':<28}{widths}  {widths}")
    base = rows["bare engine"]
    for name, times in rows.items():
        cells = [f"{one.first:8.2f}" for one in times] + [f"{one.each:8.2f}" for one in times]
        print(f"{name:<28}{'  '.join(cells)}")
        if times is not base:
            added = [f"{one.first - own.first:+8.2f}" for one, own in zip(times, base, strict=True)]
            added += [f"{one.each / own.each - 1:+8.1%}" for one, own in zip(times, base, strict=True)]
            print(f"{'  over the bare engine':<28}{'  '.join(added)}")
    print(f"\n{STREAMS} streams, a step takes {STEP_S * 1e3:g} ms: {STREAMS / STEP_S:,.0f} tokens/s at the most")
    for name, one in of_paced.items():
        print(f"{name:<28}{one.per_second:10,.0f} tokens/s   {one.each:6.2f} ms a token   first {one.first:8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--client", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        print(json.dumps([asdict(times) for times in asyncio.run(client(*options.client))]))
        return
    if not options.inside:
        namespace = ["unshare", "--map-root-user", "--net", sys.executable, "-m", "tests.bench.http_latency"]
        os.execvp(namespace[0], [*namespace, *sys.argv[1:], "--inside"])
    raise_loopback()
    new, rounds = options.new, options.rounds
    with own_ray():
        rows = {"bare engine": asyncio.run(bare(new, rounds))}
    rows["Serve's proxy"] = served(new, rounds, {})
    rows["direct streaming"] = served(new, rounds, DIRECT)
    paced_rows = {"bare engine": asyncio.run(paced_bare(new)), "over HTTP": asyncio.run(paced_over_http(new))}
    report(rows, paced_rows)


if __name__ == "__main__":
    main()
