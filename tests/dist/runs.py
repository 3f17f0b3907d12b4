"""Requests run through the scheduler in one process, and the same plans on several ranks."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import Dtype, EngineConfig, KVConfig, ParallelConfig, Quantization, SchedulerConfig
from cluster.kv_pool import PagePool
from cluster.messages import EncodeRequest, Exchange, Request, SamplingParams, StepPlan, StepResult, TokenEvent
from cluster.placement import Placement, even_placement
from cluster.results import merge
from cluster.scheduler import Scheduler
from cluster.worker import Worker
from model.comm import Groups, alone
from model.config import load_config

PAGE = 4
TOKENS = 16  # of each answer
PAGES = {1: 20, 2: 10}  # in each group; so few that somebody is preempted
FEWEST_PAGES = 9  # with more groups than two


@dataclass(frozen=True)
class Recorded:
    """What one process gave."""

    plans: tuple[StepPlan, ...]
    results: tuple[StepResult, ...]
    expert_rows: tuple[list[list[int]], ...]  # per step: of each layer, the rows of every expert
    texts: dict[tuple[str, int], tuple[int, ...]]  # request and choice -> its tokens
    preemptions: int


def engine_config(
    directory: Path,
    parallel: ParallelConfig,
    dtype: Dtype = "float32",
    quantization: Quantization = "none",
) -> EngineConfig:
    return EngineConfig(
        str(directory),
        dtype=dtype,
        quantization=quantization,
        parallel=parallel,
        kv=KVConfig(page_size=PAGE),
        scheduler=SchedulerConfig(max_running=4, max_step_tokens=12),
    )


def placement_for(config: EngineConfig) -> Placement:
    model, parallel = load_config(Path(config.model_path)), config.parallel
    return even_placement(
        model.num_hidden_layers,
        model.num_local_experts,
        parallel.ranks,
        parallel.expert_slices,
        parallel.spare_slots,
    )


def requests() -> list[Request | EncodeRequest]:
    """Greedy and seeded, prompts with a common beginning, penalties, log-probabilities, two choices, one embedding."""
    shared = tuple(range(20, 34))
    wanted: list[Request | EncodeRequest] = [EncodeRequest("pooled", (9, 8, 7, 6, 5), pooling="all")]
    for number in range(6):
        extra: dict[str, Any] = {}
        if number == 2:
            extra = {"repetition_penalty": 1.3, "logprobs": 2, "prompt_logprobs": 1}
        if number in (1, 4):
            extra = {"return_routing": True}
        sampling = SamplingParams(TOKENS, temperature=0.0 if number % 2 else 0.8, seed=number, **extra)
        prompt = (*shared[: 5 + number * 2], 40 + number)
        wanted.append(Request(str(number), prompt, sampling, n=2 if number == 3 else 1))
    return wanted


def record(config: EngineConfig) -> Recorded:
    """Each data group on a worker of its own, which has all of the model."""
    data = config.parallel.data
    pages = PAGES.get(data, FEWEST_PAGES)
    config = replace(config, parallel=ParallelConfig())
    placement = placement_for(config)
    workers = [Worker(0, config, placement) for _ in range(data)]
    for worker in workers:
        worker.load()
        worker.join(alone(), pages)
    pools = [PagePool(pages, PAGE, prefix_caching=True, key=b"k") for _ in workers]
    scheduler = Scheduler(config.scheduler, pools, eos_ids=())
    for request in requests():
        scheduler.add(request.request_id, request, 0.0)
    group_of: dict[int, int] = {}
    plans, results, expert_rows = [], [], []
    texts: dict[tuple[str, int], tuple[int, ...]] = {}
    under_way: deque[StepPlan] = deque()
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        if plan is not None:
            under_way.append(plan)
        if len(under_way) == 2 or plan is None:
            plan = under_way.popleft()
            group_of.update((start.seq, start.group) for start in plan.starts)
            parts = [worker.step(_part(plan, group, group_of)) for group, worker in enumerate(workers)]
            result = merge(parts, placement)
            expert_rows.append(rows_of_experts(result, replace(placement, expert_of=_repeated(placement, data))))
            for event in scheduler.postprocess(plan, result):
                if isinstance(event, TokenEvent):
                    key = event.request_id, event.choice
                    texts[key] = texts.get(key, ()) + event.token_ids
            plans.append(plan)
            results.append(result)
    return Recorded(tuple(plans), tuple(results), tuple(expert_rows), texts, scheduler.preemptions)


def rows_of_experts(result: StepResult, placement: Placement) -> list[list[int]]:
    """Of each layer, from the rows of its slots."""
    counted = []
    for rows, experts in zip(result.slot_rows, placement.expert_of, strict=True):
        layer = [0] * (max(experts) + 1)
        for expert, count in zip(experts, rows, strict=True):
            layer[expert] += count
        counted.append(layer)
    return counted


def _repeated(placement: Placement, times: int) -> tuple[tuple[int, ...], ...]:
    return tuple(layer * times for layer in placement.expert_of)


def _part(plan: StepPlan, group: int, group_of: dict[int, int]) -> StepPlan:
    """What one group has to do, as if it were the only one."""
    return replace(
        plan,
        chunks=tuple(chunk for chunk in plan.chunks if group_of[chunk.seq] == group),
        starts=tuple(replace(start, group=0) for start in plan.starts if start.group == group),
        group_tokens=(),
        report_load=True,
    )


def moved(placement: Placement) -> Placement:
    """Every expert sits somewhere else."""
    layers = (tuple((expert + 1) % (max(layer) + 1) for expert in layer) for layer in placement.expert_of)
    return replace(placement, expert_of=tuple(layers), number=placement.number + 1)


def replay(
    groups: Groups, config: EngineConfig, plans: tuple[StepPlan, ...], exchanges: tuple[Exchange, ...]
) -> list[StepResult]:
    """One rank's results, the exchanges taking turns.

    Half-way, experts move; before and after, a canary sees to it that they are in order.
    """
    placement = placement_for(config)
    worker = Worker(groups.world.rank, config, placement)
    worker.load()
    worker.join(groups, PAGES.get(config.parallel.data, FEWEST_PAGES))
    numbers = itertools.count()
    results = []
    for index, (plan, exchange) in enumerate(zip(plans, itertools.cycle(exchanges))):
        if index == len(plans) // 2:
            placement = moved(placement)
            worker.fetch(placement)
        if index in (0, len(plans) // 2, len(plans) - 1):
            worker.step(StepPlan(next(numbers), (), exchange=exchange, placement=placement.number, canary=True))
        plan = replace(plan, step=next(numbers), exchange=exchange, placement=placement.number, report_load=True)
        results.append(worker.step(plan))
    return results
