"""The engine over a fake group: what it takes in and what it answers."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from time import monotonic

import pytest

from cluster.config import ParallelConfig, SchedulerConfig
from cluster.errors import EngineDraining, QueueFull, RequestInvalid, StepFailed
from cluster.messages import EncodeRequest, Grammar
from cluster.observer import Rejection, Silence
from model.errors import ModelError
from tests.fake_group import FakeGroup
from tests.unit.engine_rig import alone, collect, request, running_engine, settled, text_of


async def test_events_carry_tokens_and_text_and_one_reason() -> None:
    async with running_engine() as engine:
        events = await collect(engine, request())
    tokens = [t for event in events for t in event.token_ids]
    assert tokens == alone((5, 6), 8)
    assert "".join(event.text for event in events) == text_of(tokens)
    assert [event.finish_reason for event in events] == [None] * 7 + ["length"]
    assert {event.request_id for event in events} == {"r"}


async def test_many_at_once_get_what_they_get_alone() -> None:
    async with running_engine() as engine:
        wanted = [request(f"r{n}", (n + 3, 7), seed=n) for n in range(16)]
        answers = await asyncio.gather(*(collect(engine, one) for one in wanted))
    for n, events in enumerate(answers):
        assert [t for event in events for t in event.token_ids] == alone((n + 3, 7), 8, n)


async def test_the_token_that_ends_an_answer_counts_but_has_no_text() -> None:
    tokens = alone((9,), 30)
    end = tokens[4]
    async with running_engine() as engine:
        events = await collect(engine, request(prompt=(9,), max_tokens=30, stop_token_ids=(end,)))
    shown = tokens[: tokens.index(end)]
    assert [t for event in events for t in event.token_ids] == [*shown, end]
    assert "".join(event.text for event in events) == text_of(shown)
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", end)


async def test_a_completion_is_decoded_after_its_prompt_and_a_message_by_itself() -> None:
    async with running_engine() as engine:
        await collect(engine, request("completion"))
        await collect(engine, replace(request("message"), continues_prompt=False))
        assert engine.tokenizer.decoded_after == [(5, 6), ()]  # type: ignore[attr-defined]


async def test_a_stop_string_ends_the_answer_and_the_work() -> None:
    whole = text_of(alone((9,), 30))
    stop = whole[5:8]
    async with running_engine() as engine:
        events = await collect(engine, request(prompt=(9,), max_tokens=30, stop=(stop,)))
        assert "".join(event.text for event in events) == whole[: whole.index(stop)]
        assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", stop)
        await settled(engine)


async def test_closing_the_iterator_aborts_the_request() -> None:
    async with running_engine() as engine:
        events = engine.generate(request(max_tokens=120))
        await anext(events)
        await events.aclose()  # type: ignore[attr-defined]
        await settled(engine)
        assert await collect(engine, request()), "its id can be used again"


async def test_abort_ends_the_stream() -> None:
    group = FakeGroup(64, 4)
    group.tickets = threading.Semaphore(1)
    async with running_engine(group) as engine:
        events = engine.generate(request(max_tokens=120))
        await anext(events)
        engine.abort("r")
        engine.abort("somebody else")
        group.tickets.release(9)  # for the steps under way, which the end waits for
        rest = [event async for event in events]
        assert rest[-1].finish_reason == "abort"


async def test_an_id_in_use_is_refused() -> None:
    group = FakeGroup(64, 4)
    group.tickets = threading.Semaphore(1)
    async with running_engine(group) as engine:
        events = engine.generate(request(max_tokens=100))
        await anext(events)
        with pytest.raises(RequestInvalid, match="already running"):
            await collect(engine, request())
        group.tickets.release(100)
        await events.aclose()  # type: ignore[attr-defined]


async def test_a_full_queue_is_said_before_any_work() -> None:
    group = FakeGroup(64, 4)
    group.tickets = threading.Semaphore(1)
    limits = SchedulerConfig(max_running=1, max_step_tokens=16, max_waiting=1)
    async with running_engine(group, limits) as engine:
        first, second = (engine.generate(request(f"r{n}", max_tokens=100)) for n in range(2))
        await anext(first)
        waiting = asyncio.ensure_future(anext(second))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as full:
            await collect(engine, request("r2"))
        assert full.value.retry_after_s > 0
        group.tickets.release(300)
        await first.aclose()  # type: ignore[attr-defined]
        await waiting
        await second.aclose()  # type: ignore[attr-defined]


async def test_a_draining_engine_finishes_what_runs() -> None:
    async with running_engine() as engine:
        events = engine.generate(request(max_tokens=50))
        await anext(events)
        engine.drain()
        assert engine.healthy
        assert not engine.ready
        with pytest.raises(EngineDraining):
            await collect(engine, request("late"))
        assert [event async for event in events][-1].finish_reason == "length"


async def test_seeds_drawn_for_the_caller_differ() -> None:
    async with running_engine() as engine:
        answers = [await collect(engine, request(f"r{n}", seed=None)) for n in range(4)]
    assert len({tuple(t for e in events for t in e.token_ids) for events in answers}) > 1


async def test_choices_end_each_on_their_own() -> None:
    async with running_engine() as engine:
        events = await collect(engine, request(n=3, seed=4, max_tokens=9))
    for choice in range(3):
        own = [event for event in events if event.choice == choice]
        assert [t for event in own for t in event.token_ids] == alone((5, 6), 9, 4 + choice)
        assert [event.finish_reason for event in own] == [None] * 8 + ["length"]


async def test_a_stop_string_ends_its_choice_only() -> None:
    whole = [text_of(alone((5, 6), 30, seed)) for seed in (0, 1)]
    stop = next(whole[0][i : i + 2] for i in range(3, 20) if whole[0][i : i + 2] not in whole[1])
    async with running_engine() as engine:
        events = await collect(engine, request(n=2, seed=0, max_tokens=30, stop=(stop,)))
        texts = ["".join(event.text for event in events if event.choice == choice) for choice in (0, 1)]
        assert texts == [whole[0][: whole[0].index(stop)], whole[1]]
        assert [e.finish_reason for e in events if e.finish_reason] == ["stop", "length"]
        await settled(engine)


async def test_a_stop_string_and_a_stop_token_may_be_shown() -> None:
    tokens = alone((9,), 30)
    stop = text_of(tokens[4:6])
    async with running_engine() as engine:
        shown = request(prompt=(9,), max_tokens=30, include_stop_str_in_output=True)
        by_text = await collect(engine, replace(shown, sampling=replace(shown.sampling, stop=(stop,))))
        by_token = await collect(engine, replace(shown, sampling=replace(shown.sampling, stop_token_ids=(tokens[4],))))
    whole = text_of(tokens)
    assert "".join(event.text for event in by_text) == whole[: whole.index(stop) + 2]
    assert "".join(event.text for event in by_token) == whole[: tokens.index(tokens[4]) + 1]


async def test_echo_begins_every_choice_with_the_prompt() -> None:
    async with running_engine() as engine:
        events = await collect(engine, request(n=2, echo=True, max_tokens=3))
    for choice in (0, 1):
        text = "".join(event.text for event in events if event.choice == choice)
        assert text == text_of([5, 6, *alone((5, 6), 3, choice)])


async def test_encoding() -> None:
    async with running_engine() as engine:
        rows = await engine.encode(EncodeRequest("e", (7, 8, 9), "all"))
        assert rows == [[7.0], [8.0], [9.0]]
        with pytest.raises(RequestInvalid):
            await engine.encode(EncodeRequest("e", (), "all"))


async def test_a_text_that_is_being_encoded_can_be_aborted() -> None:
    group = FakeGroup(64, 4)
    group.tickets = threading.Semaphore(0)
    async with running_engine(group) as engine:
        encoding = asyncio.ensure_future(engine.encode(EncodeRequest("e", (7, 8, 9), "all")))
        await asyncio.sleep(0)
        engine.abort("e")
        group.tickets.release(9)
        with pytest.raises(StepFailed, match="aborted"):
            await encoding
        assert await engine.encode(EncodeRequest("e", (7,), "last")) == [[7.0]]


async def test_a_deadline_passes_while_waiting() -> None:
    group = FakeGroup(64, 4)
    group.tickets = threading.Semaphore(1)
    async with running_engine(group, SchedulerConfig(max_running=1, max_step_tokens=16, max_waiting=4)) as engine:
        first = engine.generate(request("first", max_tokens=100))
        await anext(first)
        late = asyncio.ensure_future(collect(engine, request("late", deadline_s=monotonic())))
        await asyncio.sleep(0.01)
        group.tickets.release(300)
        assert [(e.finish_reason, e.error) for e in await late] == [("error", "deadline")]
        assert [event async for event in first][-1].finish_reason == "length"


async def test_limits_can_be_lowered_and_raised_again_while_requests_run() -> None:
    group = FakeGroup(64, 4)
    group.tickets = threading.Semaphore(1)
    built = SchedulerConfig(max_running=4, max_step_tokens=16, max_waiting=1)
    async with running_engine(group, built) as engine:
        first, second = (engine.generate(request(f"r{n}", max_tokens=50)) for n in range(2))
        await anext(first)
        engine.limit(SchedulerConfig(max_running=1, max_step_tokens=8, max_waiting=0))
        with pytest.raises(QueueFull):
            await collect(engine, request("third"))
        engine.limit(built)
        group.tickets.release(200)
        assert [event async for event in second][-1].finish_reason == "length"
        assert [event async for event in first][-1].finish_reason == "length"


async def test_limits_cannot_leave_what_the_ranks_were_built_for() -> None:
    async with running_engine() as engine:
        for limits in (SchedulerConfig(9, 16, 8), SchedulerConfig(8, 0, 8), SchedulerConfig(8, 16, 9)):
            with pytest.raises(ValueError, match="while the server runs"):
                engine.limit(limits)


async def test_data_groups_work_side_by_side() -> None:
    group = FakeGroup(16, 4, groups=2)
    async with running_engine(group, parallel=ParallelConfig(data=2)) as engine:
        assert engine.stats().pages_total == 32
        wanted = [request(f"r{n}", (n + 3, 7), seed=n) for n in range(16)]
        answers = await asyncio.gather(*(collect(engine, one) for one in wanted))
    for n, events in enumerate(answers):
        assert [t for event in events for t in event.token_ids] == alone((n + 3, 7), 8, n)
    assert any(all(plan.group_tokens) for plan in group.plans), "both at once"
    assert {plan.exchange for plan in group.plans} == {"all_reduce"}


async def test_the_load_of_experts_is_asked_for_and_kept() -> None:
    group = FakeGroup(64, 4)
    group.slot_rows = ((3, 1, 0, 4, 2), (1, 1, 1, 1, 1))  # four experts and a replica of the first
    async with running_engine(group) as engine:
        assert engine.experts().load[0] == (0.0, 0.0, 0.0, 0.0)
        await collect(engine, request())
        status = engine.experts()
    assert status.load[0] == (0.5, 0.1, 0.0, 0.4)
    assert status.ranks == (((0,),) * 4,) * 2
    assert [plan.report_load for plan in group.plans][:2] == [True, False], "not at every step"


class Refusals(Silence):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def rejected(self, reason: Rejection) -> None:
        self.reasons.append(reason)


async def test_whoever_keeps_count_learns_why_requests_were_not_taken_in() -> None:
    group, told = FakeGroup(64, 4), Refusals()
    group.tickets = threading.Semaphore(1)
    limits = SchedulerConfig(max_running=1, max_step_tokens=16, max_waiting=1)
    async with running_engine(group, limits, observer=told) as engine:
        with pytest.raises(RequestInvalid):
            await collect(engine, request(prompt=()))
        group.prepare_error = ModelError("a regex must close what it opens")
        with pytest.raises(RequestInvalid):
            await collect(engine, request(grammar=Grammar("regex", "(")))
        first = engine.generate(request("first", max_tokens=100))
        await anext(first)
        late = asyncio.ensure_future(collect(engine, request("late", n=2, deadline_s=monotonic())))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await collect(engine, request("one too many"))
        group.tickets.release(300)
        await late
        await first.aclose()  # type: ignore[attr-defined]
        engine.drain()
        with pytest.raises(EngineDraining):
            await engine.encode(EncodeRequest("e", (7, 8), "last"))
    assert told.reasons == ["invalid", "invalid", "queue_full", "deadline", "draining"]
