"""How long a step may take: never less than half a minute, ten times what steps like it took, whatever their order."""

from __future__ import annotations

import random

import pytest

from cluster.step_clock import FIRST_DEADLINE_S, MAX_DEADLINE_S, MIN_DEADLINE_S, SLACK, StepClock, StepForecast


def test_the_clock_tells_the_age_of_the_last_step() -> None:
    clock = StepClock()
    assert clock.age() is None
    clock.tick()
    assert 0 <= (clock.age() or 0) < 60


def test_the_first_step_may_take_its_time_and_quick_ones_have_half_a_minute() -> None:
    forecast = StepForecast()
    assert forecast.deadline_s(1) == FIRST_DEADLINE_S
    forecast.note(1, 0.01)
    assert forecast.deadline_s(1) == MIN_DEADLINE_S


def test_a_long_prompt_has_the_time_that_its_tokens_take() -> None:
    forecast = StepForecast()
    forecast.note(1, 1.0)
    assert forecast.deadline_s(64) == SLACK * 64
    forecast.note(2000, 60.0)
    assert SLACK * 60 <= forecast.deadline_s(2000) <= 2 * SLACK * 60
    assert forecast.deadline_s(500) <= SLACK * 60, "fewer tokens do not take longer"
    assert forecast.deadline_s(1_000_000) == MAX_DEADLINE_S


def test_one_slow_step_counts_at_once_and_fades() -> None:
    forecast = StepForecast()
    forecast.note(1, 5.0)
    forecast.note(1, 20.0)
    assert forecast.deadline_s(1) == SLACK * 20
    for _ in range(100):
        forecast.note(1, 5.0)
    assert forecast.deadline_s(1) == pytest.approx(SLACK * 5, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_steps_that_take_what_their_tokens_take_never_reach_the_deadline(seed: int) -> None:
    chance = random.Random(seed)
    fixed, each = chance.uniform(0, 20), chance.uniform(0, 0.2)
    forecast = StepForecast()
    forecast.note(1, fixed + each)
    for _ in range(200):
        tokens = chance.randint(1, 2048)
        seconds = (fixed + tokens * each) * chance.uniform(0.5, 2)
        assert seconds < forecast.deadline_s(tokens), f"seed {seed}"
        forecast.note(tokens, seconds)
