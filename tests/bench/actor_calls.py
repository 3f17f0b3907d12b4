"""A step's way to two actors and back: plain calls beside Ray's compiled graph, nothing computed.

    python -m tests.bench.actor_calls [--rounds 300]

Plans are those of so many decoding sequences. "ahead" is what the engine does: the next plan is handed out before the
result of the last is waited for, so that what a call costs overlaps with the ranks' work; here they work for 20 ms.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

import ray
from ray.dag import InputNode, MultiOutputNode

from cluster.messages import SequenceChunk, StepPlan, StepResult, StepTimes

RANKS = 2
WORK_S = 0.02

Send = Callable[[StepPlan], Callable[[], Any]]


class Rank:
    def __init__(self, work_s: float) -> None:
        self._work_s = work_s

    def step(self, plan: StepPlan) -> StepResult:
        if self._work_s:
            time.sleep(self._work_s)
        return StepResult(plan.step, tuple(range(len(plan.chunks))), (0,) * len(plan.chunks), StepTimes())


def plan_of(sequences: int, step: int) -> StepPlan:
    return StepPlan(step, tuple(SequenceChunk(seq, (-1,), 1000 + step, (), True) for seq in range(sequences)))


def calls(actors: list[Any]) -> Send:
    def send(plan: StepPlan) -> Callable[[], Any]:
        references = [actor.step.remote(plan) for actor in actors]
        return lambda: ray.get(references)

    return send


def graph(actors: list[Any]) -> tuple[Send, Callable[[], None]]:
    with InputNode() as plan:
        compiled = MultiOutputNode([actor.step.bind(plan) for actor in actors]).experimental_compile()

    def send(plan: StepPlan) -> Callable[[], Any]:
        references = compiled.execute(plan)
        return lambda: ray.get(references)

    return send, compiled.teardown


def round_trip_ms(send: Send, sequences: int, rounds: int, ahead: int) -> float:
    under_way: deque[Callable[[], Any]] = deque()
    times = []
    last = time.perf_counter()
    for step in range(rounds):
        under_way.append(send(plan_of(sequences, step)))
        if len(under_way) > ahead:
            under_way.popleft()()
            now = time.perf_counter()
            times.append(now - last)
            last = now
    while under_way:
        under_way.popleft()()
    return median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    rounds: int = parser.parse_args().rounds
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=4)
    print(f"{'ms a step, 2 actors':24}{'sequences':>10}{'calls':>10}{'graph':>10}")
    make = ray.remote(num_cpus=0)(Rank)
    for name, work_s, ahead, count in (
        ("nothing computed", 0.0, 0, rounds),
        ("20 ms, one ahead", WORK_S, 1, rounds // 5),
    ):
        for sequences in (1, 32, 256):
            plain = round_trip_ms(calls([make.remote(work_s) for _ in range(RANKS)]), sequences, count, ahead)
            send, teardown = graph([make.remote(work_s) for _ in range(RANKS)])
            compiled = round_trip_ms(send, sequences, count, ahead)
            teardown()
            print(f"{name:24}{sequences:>10}{plain:>10.2f}{compiled:>10.2f}", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
