"""The engine over a fake group: everything that can go wrong, one request and all of them."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from cluster.answer import Answers
from cluster.config import ParallelConfig, SchedulerConfig
from cluster.errors import EngineNotReady, RequestInvalid, StepFailed
from cluster.messages import EncodeRequest, Grammar, TokenEvent
from model.errors import ModelError
from tests.fake_group import FakeGroup
from tests.unit.engine_rig import alone, collect, request, running_engine, settled, until


async def test_what_can_never_run_is_refused_with_both_numbers() -> None:
    async with running_engine() as engine:
        with pytest.raises(
            RequestInvalid, match="2 tokens and 127 more were asked for; together they must be 1 to 128"
        ):
            await collect(engine, request(max_tokens=127))
        with pytest.raises(RequestInvalid):
            await collect(engine, request(prompt=()))


async def test_a_failed_step_answers_everyone_and_makes_the_engine_unhealthy() -> None:
    group = FakeGroup(64, 4)
    group.tickets = threading.Semaphore(1)
    async with running_engine(group) as engine:
        events = engine.generate(request(max_tokens=120))
        await anext(events)
        group.fail_with = RuntimeError("rank 1 died during a step")
        group.tickets.release()
        rest = [event async for event in events]
        assert rest[-1].finish_reason == "error"
        assert rest[-1].error == "rank 1 died during a step"
        assert not engine.healthy
        with pytest.raises(EngineNotReady, match="rank 1 died"):
            await collect(engine, request())


@pytest.mark.parametrize("seed", range(5))
async def test_deaths_at_any_step_lose_and_repeat_no_token(seed: int) -> None:
    chance = random.Random(seed)
    group = FakeGroup(24, 4)
    # Rare enough that nobody is in three of them without a token between, which would make it the culprit.
    group.fail_at = {step for step in range(2, 400, 13) if chance.random() < 0.8}
    async with running_engine(group, SchedulerConfig(max_running=5, max_step_tokens=16, max_waiting=20)) as engine:
        wanted = [
            request(f"r{n}", tuple(range(3, 4 + n)), seed=n, n=1 + n % 2, max_tokens=20, logprobs=0, prompt_logprobs=0)
            for n in range(10)
        ]
        answers = await asyncio.gather(*(collect(engine, one) for one in wanted))
        assert engine.stats().recoveries == group.epoch > 3
        assert await engine.encode(EncodeRequest("e", (7, 8, 9), "all")) == [[7.0], [8.0], [9.0]]
    for one, events in zip(wanted, answers, strict=True):
        for choice in range(one.n):
            own = [event for event in events if event.choice == choice]
            tokens = [t for event in own for t in event.token_ids]
            assert tokens == alone(one.prompt_ids, 20, one.sampling.seed + choice), f"seed {seed}"  # type: ignore[operator]
            assert [p.token_id for event in own for p in event.logprobs] == tokens
            assert [e.finish_reason for e in own if e.finish_reason] == ["length"]
        assert events[0].prompt_logprobs is not None
        assert len(events[0].prompt_logprobs) == len(one.prompt_ids)


async def test_groups_that_lose_no_rank_go_on_where_they_were() -> None:
    wanted = [request(f"r{n}", tuple(range(3 + n, 23 + n)), seed=n, max_tokens=12) for n in range(8)]
    computed: dict[tuple[int, ...], int] = {}
    for lost in ((0, 1), (1,), ()):
        group = FakeGroup(64, 4, groups=2)
        group.lost = lost
        group.fail_at = {7}
        async with running_engine(group, SchedulerConfig(8, 64, 8), ParallelConfig(data=2)) as engine:
            answers = await asyncio.gather(*(collect(engine, one) for one in wanted))
            assert engine.stats().recoveries == 1
        for n, events in enumerate(answers):
            assert [t for event in events for t in event.token_ids] == alone(wanted[n].prompt_ids, 12, n)
        computed[lost] = group.computed
    assert computed[()] < computed[1,] < computed[0, 1]


async def test_a_death_between_steps_is_recovered_from_at_once() -> None:
    group = FakeGroup(64, 4)
    async with running_engine(group) as engine:
        await collect(engine, request())
        engine.rank_lost("rank 0 died", 0)
        engine.rank_lost("rank 0 died", 0)  # the same death, heard of twice
        await until(lambda: engine.stats().recoveries == 1 and engine.ready)
        events = await collect(engine, request())
        assert [t for event in events for t in event.token_ids] == alone((5, 6), 8)
        assert engine.stats().recoveries == group.epoch == 1


async def test_while_ranks_are_replaced_new_requests_are_told_to_come_back() -> None:
    group = FakeGroup(64, 4)
    held = threading.Event()
    recover = group.recover
    group.recover = lambda *, anew: (held.wait(), recover(anew=anew))[1]  # type: ignore[method-assign]
    async with running_engine(group) as engine:
        engine.rank_lost("rank 0 died", 0)
        await until(lambda: not engine.ready)
        assert engine.healthy
        with pytest.raises(EngineNotReady, match="being replaced") as told:
            await collect(engine, request())
        assert told.value.retry_after_s > 0
        held.set()
        await until(lambda: engine.ready)
        assert await collect(engine, request())


async def test_a_grammar_that_cannot_be_compiled_is_the_caller_s_mistake() -> None:
    group = FakeGroup(64, 4)
    group.prepare_error = ModelError("a regex must close what it opens")
    async with running_engine(group) as engine:
        with pytest.raises(RequestInvalid, match="must close what it opens"):
            await collect(engine, request(grammar=Grammar("regex", "(")))
        with pytest.raises(RequestInvalid, match="must close what it opens"):
            await engine.prepare(Grammar("regex", "("), opens_text=True)
        assert engine.stats().steps == 0
        group.prepare_error = StepFailed("rank 0 died")
        with pytest.raises(EngineNotReady, match="rank 0 died"):
            await engine.prepare(Grammar("regex", "a"), opens_text=True)


async def test_a_sequence_that_fails_fails_alone() -> None:
    group = FakeGroup(64, 4)
    group.tickets = threading.Semaphore(0)
    async with running_engine(group) as engine:
        bad, good = (asyncio.ensure_future(collect(engine, request(f"r{n}", max_tokens=4))) for n in range(2))
        await asyncio.sleep(0.01)
        group.fail_sequence = "its grammar has no answer"
        group.tickets.release()
        assert [(e.finish_reason, e.error) for e in await bad] == [("error", "its grammar has no answer")]
        group.fail_sequence = None
        group.tickets.release(50)
        assert [t for event in await good for t in event.token_ids] == alone((5, 6), 4)
        assert engine.healthy


async def test_text_that_cannot_be_made_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_engine() as engine:
        show = Answers.show

        def fails_for_one(answers: Answers, event: TokenEvent) -> TokenEvent | None:
            if event.request_id.startswith("bad"):
                raise ValueError("no such text")
            return show(answers, event)

        monkeypatch.setattr(Answers, "show", fails_for_one)
        bad, good = await asyncio.gather(
            collect(engine, request("bad", max_tokens=100)), collect(engine, request("good")), return_exceptions=True
        )
        assert isinstance(bad, ValueError)
        assert not isinstance(good, BaseException)
        assert [t for event in good for t in event.token_ids] == alone((5, 6), 8)
        await settled(engine)
        assert engine.healthy


async def test_ids_that_the_model_does_not_have_never_reach_a_step() -> None:
    async with running_engine() as engine:
        with pytest.raises(RequestInvalid, match="token ids are 0 to 383"):
            await collect(engine, request(prompt=(5, 384)))
        with pytest.raises(RequestInvalid, match="token ids are 0 to 383"):
            await engine.encode(EncodeRequest("e", (-1,), "last"))
        assert engine.stats().steps == 0
