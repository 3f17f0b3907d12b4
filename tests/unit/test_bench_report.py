"""What a load generator's figures are, with a clock that stands still until it is told to move."""

from __future__ import annotations

import json
import random

import pytest

from deployments.bench_report import MOST_KINDS, AnswerTimer, Durations, Measurements, page


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def measured(clock: Clock) -> Measurements:
    return Measurements(clock)


def test_an_answer_in_its_parts(clock: Clock, measured: Measurements) -> None:
    timer = AnswerTimer(measured, prompt_tokens=100)
    for wait_s in (2.0, 0.5, 0.25):
        clock.now += wait_s
        timer.text()
    clock.now += 0.25
    timer.finished(tokens=4)  # one of them had no text of its own
    clock.now += 1.0
    measured.end()
    clock.now += 100.0
    report = measured.report()
    assert report["seconds"] == 4.0
    assert report["requests"] == {"finished": 1, "failed": 0, "cut_off": 0}
    assert (report["prompt_tokens"], report["output_tokens"]) == (100, 4)
    assert report["per_second"] == {"requests": 0.25, "prompt_tokens": 25.0, "output_tokens": 1.0}
    assert report["first_token_s"] == {"count": 1, "mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0, "max": 2.0}
    assert report["between_tokens_s"] == {"count": 2, "mean": 0.375, "p50": 0.25, "p90": 0.5, "p99": 0.5, "max": 0.5}
    assert report["whole_answer_s"]["mean"] == 3.0


def test_what_is_cut_off_counts_with_what_came(clock: Clock, measured: Measurements) -> None:
    AnswerTimer(measured, prompt_tokens=10)  # no token yet: its prompt has not been computed either
    begun = AnswerTimer(measured, prompt_tokens=20)
    AnswerTimer(measured, prompt_tokens=30)
    measured.failed("503 not_ready")
    clock.now += 1.0
    begun.text()
    report = measured.report()
    assert report["requests"] == {"finished": 0, "failed": 1, "cut_off": 2}
    assert (report["prompt_tokens"], report["output_tokens"]) == (20, 1)
    assert report["whole_answer_s"] is None
    assert report["errors"] == {"503 not_ready": 1}


def test_kinds_of_errors_are_bounded(measured: Measurements) -> None:
    for number in range(MOST_KINDS + 5):
        measured.failed(f"500 code-{number}")
        measured.failed("500 code-0")
    assert len(measured.errors) == MOST_KINDS + 1
    assert measured.errors["other"] == 5
    assert measured.errors["500 code-0"] == MOST_KINDS + 6


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1000])
def test_a_quantile_is_a_duration_that_so_many_stay_within(count: int) -> None:
    chance = random.Random(count)
    values = [chance.expovariate(1.0) for _ in range(count)]
    durations = Durations()
    for value in values:
        durations.add(value)
    summary = durations.summary()
    assert summary is not None
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert sum(value <= summary[name] for value in values) >= share * count
        assert sum(value < summary[name] for value in values) < share * count
    assert summary["max"] == max(values)
    assert summary["mean"] == pytest.approx(sum(values) / count)


def test_of_very_many_durations_a_fair_choice_is_kept() -> None:
    durations = Durations(most=500)
    for number in range(20_000):
        durations.add(float(number))
    assert len(durations._kept) == 500
    summary = durations.summary()
    assert summary is not None
    assert (summary["count"], summary["max"], summary["mean"]) == (20_000, 19_999.0, 9_999.5)
    assert summary["p50"] == pytest.approx(10_000, rel=0.15)
    assert summary["p90"] == pytest.approx(18_000, rel=0.05)


def test_the_page_and_the_document_say_the_same(clock: Clock, measured: Measurements) -> None:
    timer = AnswerTimer(measured, prompt_tokens=8)
    clock.now += 0.125
    timer.text()
    timer.finished(tokens=1)
    AnswerTimer(measured, prompt_tokens=8)
    measured.failed("429 queue_full")
    report = measured.report()
    assert json.loads(json.dumps(report)) == report
    text = page(report)
    assert "1 requests finished in 0.1 s, 1 failed, 0 were cut off at the end." in text
    assert "8.00 requests, 64.0 prompt tokens, 8.0 tokens of answers" in text
    (first,) = [line for line in text.splitlines() if "first token" in line]
    assert first.split() == ["first", "token", *["125.0"] * 5]
    assert "between tokens" not in text, "there were none"
    assert "  1 x 429 queue_full" in text
