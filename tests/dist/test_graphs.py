"""Ranks that replay decode steps, collectives included, against one process that computes them.

Kernels run in Triton's interpreter, and a capture computes again: what is shown is that all ranks agree about every
collective, not that a GPU takes it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cluster.held_experts
import model.mixtral
from cluster.config import EngineConfig, KVConfig, ParallelConfig, SchedulerConfig
from cluster.messages import LAST_SAMPLED, SamplingParams, SequenceChunk, SequenceStart, StepPlan, StepResult
from cluster.placement import even_placement
from cluster.rendezvous import has_shared_memory
from cluster.results import merge
from cluster.worker import Worker
from model.comm import Groups, alone
from model.config import MixtralConfig
from tests.dist.ranks import run_ranks
from tests.recomputed import Recomputed
from tests.tiny import write_checkpoint

os.environ["TRITON_INTERPRET"] = "1"  # before it is imported
pytest.importorskip("triton", reason="kernels run in Triton's interpreter")
pytestmark = pytest.mark.skipif(not has_shared_memory(), reason="shared memory transport is for x86-64 Linux")

PROMPTS = ((5, 9, 17), (30, 8))
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, seed=0)


def engine_config(directory: Path, parallel: ParallelConfig) -> EngineConfig:
    scheduler = SchedulerConfig(max_running=2, max_step_tokens=8)
    return EngineConfig(str(directory), parallel=parallel, kv=KVConfig(page_size=4), scheduler=scheduler)


def plans(data: int) -> list[StepPlan]:
    """Both prompts, then decodes of both and of the first alone; with two groups one text in each."""
    starts = [SequenceStart(seq, ids, len(ids), GREEDY, group=seq % data) for seq, ids in enumerate(PROMPTS)]
    chunks = [SequenceChunk(seq, ids, 0, (4 * seq, 4 * seq + 1), True) for seq, ids in enumerate(PROMPTS)]
    steps = [StepPlan(0, tuple(chunks), tuple(starts), report_load=True)]
    for step, seqs in enumerate(((0, 1), (0, 1), (0,)), 1):
        decodes = (SequenceChunk(seq, (LAST_SAMPLED,), len(PROMPTS[seq]) + step - 1, (), True) for seq in seqs)
        steps.append(StepPlan(step, tuple(decodes), report_load=True))
    if data == 1:
        return steps
    counts = [tuple(len(chunk.token_ids) for chunk in plan.chunks) for plan in steps]
    return [replace(plan, group_tokens=(*tokens, 0)[:2]) for plan, tokens in zip(steps, counts, strict=True)]


def replayed(groups: Groups, config: EngineConfig, steps: Sequence[StepPlan]) -> list[StepResult]:
    from model.triton_backend import TritonBackend

    def backend_for(config: MixtralConfig, device: torch.device, dtype: torch.dtype) -> TritonBackend:
        return TritonBackend(config, device, dtype, Recomputed)

    for where in (model.mixtral, cluster.held_experts):  # of this process, which is a fork
        where.backend_for = backend_for  # type: ignore[attr-defined]
    worker = Worker(groups.world.rank, config, even_placement(1, 4, config.parallel.ranks))
    worker.load()
    worker.join(groups, num_pages=8)
    prompts, *decodes = [replace(plan, exchange="all_reduce") for plan in steps]
    results = [worker.step(prompts)]
    for number, rows in enumerate((2, 1)):
        worker.step(StepPlan(1 + number, (), exchange="all_reduce", capture=rows))
    for plan in decodes:
        rows = max(plan.group_tokens or (plan.num_tokens,))
        results.append(worker.step(replace(plan, step=plan.step + 2, graph=rows)))
    return results


@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (1, 2)])
def test_replayed_steps_of_ranks_are_those_of_one_process(tmp_path: Path, tensor: int, data: int) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}  # the interpreter is slow
    write_checkpoint(tmp_path, **small, max_position_embeddings=16, vocab_size=64)
    one = Worker(0, engine_config(tmp_path, ParallelConfig()), even_placement(1, 4, 1))
    one.load()
    one.join(alone(), num_pages=8)
    expected = [one.step(replace(plan, group_tokens=())) for plan in plans(1)]

    config = engine_config(tmp_path, ParallelConfig(tensor=tensor, data=data))
    of_ranks = run_ranks(2, replayed, config, plans(data), tensor=tensor, transport="shared_memory")
    placement = even_placement(1, 4, 2)
    for found, wanted in zip(zip(*of_ranks, strict=True), expected, strict=True):
        step = merge(found, placement)
        assert dict(zip(step.seqs, step.token_ids, strict=True)) == dict(
            zip(wanted.seqs, wanted.token_ids, strict=True)
        )
        # Of prompts one process computes fewer rows in its last block.
        assert step.step == 0 or step.slot_rows == wanted.slot_rows, "padding is no load"
    assert [step.graph for step in of_ranks[0]] == [None, True, True, True]
