"""What planning a step costs, against the number of sequences that run, of data groups, and of requests that wait.

    python -m tests.bench.scheduler_overhead

Every sequence decodes with 1,000 tokens of context; the model is a constant. Milliseconds per step, median of 200:
schedule and postprocess of the scheduler, and pickling of the plan as it goes to a rank.
"""

from __future__ import annotations

import pickle
from statistics import median
from time import perf_counter

from cluster.config import SchedulerConfig
from cluster.kv_pool import PagePool
from cluster.messages import Request, SamplingParams, StepPlan, StepResult, StepTimes
from cluster.scheduler import Scheduler

CONTEXT = 1000
STEPS = 200


def result(plan: StepPlan) -> StepResult:
    seqs = tuple(chunk.seq for chunk in plan.chunks if chunk.sample)
    return StepResult(plan.step, seqs, (7,) * len(seqs), StepTimes())


def measure(running: int, groups: int, waiting: int) -> tuple[float, float, float, int]:
    """Seconds of schedule, postprocess and pickling, and the plan's bytes."""
    pools = [PagePool(running * 80, 16, prefix_caching=True, key=b"k") for _ in range(groups)]
    scheduler = Scheduler(SchedulerConfig(running, 1 << 20, waiting), pools, eos_ids=())
    for number in range(running + waiting):
        prompt = tuple((number + i) % 1000 for i in range(CONTEXT))
        request = Request(str(number), prompt, SamplingParams(STEPS + 10, seed=0), user=str(number))
        scheduler.add(str(number), request, 0.0)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    rows = []
    size = 0
    for _ in range(STEPS):
        began = perf_counter()
        ahead = scheduler.schedule(0.0)
        scheduled = perf_counter()
        scheduler.postprocess(plan, result(plan))
        processed = perf_counter()
        size = len(pickle.dumps(ahead))
        rows.append((scheduled - began, processed - scheduled, perf_counter() - processed))
        assert ahead is not None
        plan = ahead
    schedule, postprocess, pickled = (median(column) for column in zip(*rows, strict=True))
    return schedule, postprocess, pickled, size


def main() -> None:
    print(
        f"{'running':>8}{'groups':>8}{'waiting':>9}"
        f"{'schedule ms':>13}{'postprocess ms':>16}{'pickle ms':>11}{'plan bytes':>12}"
    )
    for running, groups, waiting in (*((n, 1, 0) for n in (1, 8, 32, 64, 256)), (256, 4, 0), (256, 1, 1024)):
        schedule, postprocess, pickled, size = measure(running, groups, waiting)
        print(
            f"{running:>8}{groups:>8}{waiting:>9}"
            f"{schedule * 1e3:>13.3f}{postprocess * 1e3:>16.3f}{pickled * 1e3:>11.3f}{size:>12}"
        )


if __name__ == "__main__":
    main()
