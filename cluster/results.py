"""The results of all ranks of a step as one."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.messages import StepResult
from cluster.placement import Placement


def merge(results: Sequence[StepResult], placement: Placement) -> StepResult:
    """What a step gave, from every rank's part of it in rank order.

    Nothing is said twice, for each sequence is one data group's; plans name the groups in order, and so do results.
    All slices of a slot compute the same rows: the first one's count is the slot's.
    """
    first = results[0]
    assert all(result.step == first.step for result in results)
    counted = [result.slot_rows for result in results[:: placement.slices]]
    return StepResult(
        first.step,
        tuple(seq for result in results for seq in result.seqs),
        tuple(token_id for result in results for token_id in result.token_ids),
        first.times,
        {seq: value for result in results for seq, value in result.logprobs.items()},
        {seq: value for result in results for seq, value in result.prompt_logprobs.items()},
        {seq: value for result in results for seq, value in result.pooled.items()},
        {seq: value for result in results for seq, value in result.failed.items()},
        {seq: value for result in results for seq, value in result.routing.items()},
        tuple(sum(layer, ()) for layer in zip(*counted, strict=True)),
        first.graph,
    )
