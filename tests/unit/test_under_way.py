"""A step that the ranks have been given: its deadline, and what is told of it."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from cluster.errors import StepFailed
from cluster.messages import EngineStats, SequenceChunk, StepPlan, StepResult, StepTimes
from cluster.step_clock import StepForecast
from cluster.under_way import CAPTURE_WITHIN_S, UnderWay

CHUNKS = (SequenceChunk(0, (5,), 3, (), True), SequenceChunk(1, (5, 6, 7), 0, (0,), True))


def given(plan: StepPlan) -> UnderWay:
    return UnderWay(plan, Future(), schedule_s=0.5, handed_out=10.0)


def test_a_capture_has_a_deadline_of_its_own() -> None:
    forecast = StepForecast()
    forecast.note(4, 20.0)
    assert given(StepPlan(0, CHUNKS)).deadline_s(forecast) == 200.0
    assert given(StepPlan(0, (), capture=8)).deadline_s(forecast) == CAPTURE_WITHIN_S
    assert given(StepPlan(0, (), canary=True)).num_tokens == 1


def test_a_step_that_is_late_has_failed() -> None:
    with pytest.raises(StepFailed, match="step 3 took longer than 0 s") as error:
        given(StepPlan(3, CHUNKS)).result(0)
    assert error.value.cause == "deadline"


def test_what_is_told_of_it() -> None:
    stats = EngineStats(1, 0, 8, 2, 5, 0, 0, 0)
    result = StepResult(0, (0, 1), (7, 8), StepTimes(), graph=True)
    record = given(StepPlan(0, CHUNKS, exchange="all_reduce")).record(
        result, stats, ((3, 1),), ((0, 1),), done=12.0, taken=12.25, published=12.5
    )
    assert (record.prompt_tokens, record.decode_tokens, record.sequences) == (3, 1, 2)
    assert (record.schedule_s, record.step_s, record.postprocess_s, record.publish_s) == (0.5, 2.0, 0.25, 0.25)
    assert (record.exchange, record.graph, record.stats) == ("all_reduce", True, stats)
    assert (record.slot_rows, record.slot_experts) == (((3, 1),), ((0, 1),))
