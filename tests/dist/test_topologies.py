"""N ranks = one rank: logits within rounding, and the same tokens for every exchange and transport."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.all_to_all import AllReduce, AllToAll, SlotTables
from cluster.config import EngineConfig, KVConfig, ParallelConfig, SchedulerConfig
from cluster.kv_pool import PagePool
from cluster.messages import Exchange, Request, SamplingParams, StepPlan, StepResult
from cluster.placement import even_placement
from cluster.process_group import Transport
from cluster.scheduler import Scheduler
from cluster.worker import Worker
from model.batch import Batch, SequenceSpan
from model.checkpoint import load_weights
from model.comm import Comm, SoloComm
from model.config import load_config
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.shard import Shard
from tests.dist.ranks import run_ranks
from tests.tiny import write_checkpoint

NUM_PAGES = 32
EXCHANGES: list[Exchange] = ["all_to_all", "all_reduce"]


@dataclass(frozen=True)
class Shape:
    """A checkpoint and the number of ranks it is cut for."""

    ranks: int
    overrides: tuple[tuple[str, int], ...] = ()


SHAPES = {
    "even": Shape(2),
    "more ranks than key-value heads": Shape(4, (("num_key_value_heads", 2),)),
    "experts that do not divide": Shape(2, (("num_local_experts", 5),)),
    "fewer experts than ranks": Shape(4, (("num_local_experts", 3), ("num_attention_heads", 8), ("vocab_size", 391))),
    "one expert per token": Shape(2, (("num_experts_per_tok", 1),)),
    "8 ranks": Shape(8, (("num_attention_heads", 8), ("num_local_experts", 8), ("num_key_value_heads", 4))),
}


def checkpoint(directory: Path, shape: Shape) -> Path:
    return write_checkpoint(directory, **dict(shape.overrides))


def prefill_logits(comm: Comm, directory: Path, exchange: Exchange) -> Tensor:
    """Logits of every row of two prompts in one batch, on one rank or several."""
    config = load_config(directory)
    placement = even_placement(config.num_hidden_layers, config.num_local_experts, comm.size)
    shard = Shard(comm.rank, comm.size, placement.slots_of(comm.rank))
    device = torch.device("cpu")
    weights = load_weights(directory, config, shard, dtype=torch.float32, device=device)
    kv = KVCache(config, shard, num_pages=NUM_PAGES, page_size=4, dtype=torch.float32, device=device)
    token_ids = torch.randint(3, 380, (17,), generator=torch.Generator().manual_seed(1))
    position = torch.cat([torch.arange(11), torch.arange(6)])
    slot = torch.cat([torch.arange(11), 16 + torch.arange(6)])
    spans = (SequenceSpan(0, 11, 11, ((0, 3),)), SequenceSpan(11, 6, 6, ((4, 2),)))
    batch = Batch(token_ids, position, slot, spans, torch.arange(17))
    tables = SlotTables(placement, comm.rank, device)
    match exchange:
        case "none":
            moved: AllToAll | AllReduce | OneRank = OneRank(config.num_local_experts)
        case "all_to_all":
            moved = AllToAll(comm, tables, 17)
        case "all_reduce":
            moved = AllReduce(comm, tables)
    model = Mixtral(config, weights, tensor=comm)
    return model.logits(model.forward(batch, kv, moved))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_many_ranks_are_those_of_one(name: str, exchange: Exchange, tmp_path: Path) -> None:
    shape = SHAPES[name]
    directory = checkpoint(tmp_path / "model", shape)
    whole = prefill_logits(SoloComm(), directory, "none")
    for logits in run_ranks(shape.ranks, prefill_logits, directory, exchange):
        torch.testing.assert_close(logits, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


def engine_config(directory: Path, ranks: int) -> EngineConfig:
    return EngineConfig(
        str(directory),
        parallel=ParallelConfig(tensor=ranks),
        kv=KVConfig(page_size=4),
        scheduler=SchedulerConfig(max_running=4, max_step_tokens=12),
    )


def recorded_run(directory: Path) -> list[tuple[StepPlan, StepResult]]:
    """Six requests, greedy and seeded, through the scheduler on one rank: chunked, preempted, prefix-cached."""
    config = engine_config(directory, 1)
    model = load_config(directory)
    worker = Worker(0, config, even_placement(model.num_hidden_layers, model.num_local_experts, 1))
    worker.load()
    worker.join(SoloComm(), NUM_PAGES)
    pool = PagePool(NUM_PAGES, 4, prefix_caching=True, key=b"k")
    scheduler = Scheduler(config.scheduler, [pool], eos_ids=())
    shared = tuple(range(20, 34))
    for number in range(6):
        extra = {"repetition_penalty": 1.3, "logprobs": 2, "prompt_logprobs": 1} if number == 2 else {}
        sampling = SamplingParams(30, temperature=0.0 if number % 2 else 0.8, seed=number, **extra)  # type: ignore[arg-type]
        prompt = (*shared[: 5 + number * 2], 40 + number)
        scheduler.add(str(number), Request(str(number), prompt, sampling, n=2 if number == 3 else 1), 0.0)
    steps: list[tuple[StepPlan, StepResult]] = []
    under_way: deque[StepPlan] = deque()
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        if plan is not None:
            under_way.append(plan)
        if len(under_way) == 2 or plan is None:
            plan = under_way.popleft()
            result = worker.step(plan)
            scheduler.postprocess(plan, result)
            steps.append((plan, result))
    assert scheduler.preemptions > 0
    return steps


def replay(comm: Comm, directory: Path, plans: list[StepPlan]) -> list[tuple[int, ...]]:
    config = engine_config(directory, comm.size)
    model = load_config(directory)
    worker = Worker(comm.rank, config, even_placement(model.num_hidden_layers, model.num_local_experts, comm.size))
    worker.load()
    worker.join(comm, NUM_PAGES)
    return [worker.step(plan).token_ids for plan in plans]


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_plans_give_the_same_tokens(
    ranks: int, exchange: Exchange, transport: Transport, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model")
    steps = recorded_run(directory)
    plans = [replace(plan, exchange=exchange) for plan, _ in steps]
    tokens = run_ranks(ranks, replay, directory, plans, transport=transport)[0]
    assert tokens == [result.token_ids for _, result in steps]
