"""A step's way to two actors and back: through a line, as ranks take it, beside a bare call and Ray's compiled graph.

    python -m tests.bench.actor_calls [--rounds 300]

    bare    one thread receives a step, works and answers, then receives the next
    line    cluster/step_line.py: two threads receive, prepare and answer, a third works
    graph   Ray's compiled graph: channels in shared memory, one thread as in a bare call

Plans are those of so many decoding sequences. "ahead" is what the engine does: the next plan is handed out before the
result of the last is waited for, so that its way overlaps with the ranks' work; here they work by sleeping, which
leaves the cores to what is measured. "outside" is the part of a step in which the first rank did not work. The three
take turns, all on actors that stay; medians of a turn's steps, and of the turns.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import ray
from ray.dag import InputNode, MultiOutputNode

from cluster.messages import SequenceChunk, StepPlan, StepResult, StepTimes
from cluster.step_line import CALLERS, StepLine

RANKS = 2
TURNS = 3
WAYS = ("bare", "line", "graph")

Send = Callable[[StepPlan], Callable[[], list[StepResult]]]


@dataclass
class Output:
    plan: StepPlan
    worked_s: float

    def result(self) -> StepResult:
        seqs = tuple(chunk.seq for chunk in self.plan.chunks)
        return StepResult(self.plan.step, seqs, (0,) * len(seqs), StepTimes(experts=self.worked_s))


class Sleeper:
    """A worker that needs nothing but time."""

    def __init__(self, work_s: float) -> None:
        self._work_s = work_s
        self.next_step = 0

    def join(self, leave: threading.Event) -> None:
        self.next_step = 0

    def prepare(self, plan: StepPlan) -> StepPlan:
        self.next_step += 1
        return plan

    def compute(self, plan: StepPlan) -> Output:
        began = time.perf_counter()
        if self._work_s:
            time.sleep(self._work_s)
        return Output(plan, time.perf_counter() - began)


class Rank:
    def __init__(self, work_s: float) -> None:
        self._sleeper = Sleeper(work_s)
        self._line = StepLine(self._sleeper)

    def begin(self) -> None:
        """Steps count from 0 again."""
        self._line.form(self._sleeper.join, epoch=0)

    def bare(self, plan: StepPlan) -> StepResult:
        return self._sleeper.compute(plan).result()

    def line(self, plan: StepPlan) -> StepResult:
        return self._line.step(plan, 0)


def plan_of(sequences: int, step: int) -> StepPlan:
    return StepPlan(step, tuple(SequenceChunk(seq, (-1,), 1000 + step, (), True) for seq in range(sequences)))


@contextmanager
def ways(work_s: float) -> Iterator[dict[str, Send]]:
    """Each with actors of its own."""
    options: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {"step": CALLERS}}
    make = ray.remote(**options)(Rank)
    actors: dict[str, list[Any]] = {way: [make.remote(work_s) for _ in range(RANKS)] for way in WAYS}
    ray.get([actor.begin.remote() for actor in actors["line"]])
    to_line = [actor.line.options(concurrency_group="step") for actor in actors["line"]]
    with InputNode() as plan:
        compiled = MultiOutputNode([actor.bare.bind(plan) for actor in actors["graph"]]).experimental_compile()

    def calls(methods: list[Any]) -> Send:
        def send(plan: StepPlan) -> Callable[[], list[StepResult]]:
            references = [method.remote(plan) for method in methods]
            return lambda: ray.get(references)

        return send

    def through_graph(plan: StepPlan) -> Callable[[], list[StepResult]]:
        references = compiled.execute(plan)
        return lambda: ray.get(references)

    yield {"bare": calls([actor.bare for actor in actors["bare"]]), "line": calls(to_line), "graph": through_graph}
    compiled.teardown()
    for actor in (actor for own in actors.values() for actor in own):
        ray.kill(actor)


def turn(send: Send, sequences: int, steps: range, ahead: int) -> tuple[float, float]:
    """Milliseconds a step, and the share of them in which the first rank did not work."""
    under_way: deque[Callable[[], list[StepResult]]] = deque()
    times: list[float] = []
    worked: list[float] = []
    last = time.perf_counter()
    for step in (*steps, *(None for _ in range(ahead))):
        if step is not None:
            under_way.append(send(plan_of(sequences, step)))
        if step is None or len(under_way) > ahead:
            worked.append(under_way.popleft()()[0].times.experts)
            now = time.perf_counter()
            times.append(now - last)
            last = now
    return median(times) * 1e3, 1 - median(worked) / median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=300, help="steps of a turn; a quarter of them where a step is long"
    )
    rounds: int = parser.parse_args().rounds
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=4)
    print(f"{'ms a step, 2 actors':24}{'sequences':>10}" + "".join(f"{way:>10}" for way in WAYS) + "   outside, line")
    for name, work_s, ahead, count in (
        ("nothing computed", 0.0, 0, rounds),
        ("5 ms, one ahead", 0.005, 1, rounds),
        ("20 ms, one ahead", 0.02, 1, rounds // 4),
    ):
        with ways(work_s) as sends:
            begun = 0
            for sequences in (1, 32, 256):
                taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
                for _ in range(TURNS):
                    steps = range(begun, begun + count)
                    begun += count
                    for way, send in sends.items():
                        taken[way].append(turn(send, sequences, steps, ahead))
                columns = [median(ms for ms, _ in taken[way]) for way in WAYS]
                outside = median(share for _, share in taken["line"])
                row = f"{name:24}{sequences:>10}" + "".join(f"{ms:10.2f}" for ms in columns)
                print(row + (f"{100 * outside:14.1f} %" if work_s else ""), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
