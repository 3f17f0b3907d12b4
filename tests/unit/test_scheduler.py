"""The scheduler over a fake group, always one step ahead, as the engine drives it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import SchedulerConfig
from cluster.messages import EncodeEvent, Pooling, TokenEvent
from cluster.sequence import Sequence
from tests.fake_group import next_token
from tests.unit.scheduler_rig import EOS, Rig, alone


def test_one_request() -> None:
    rig = Rig()
    rig.add("a", [5, 6, 7])
    rig.run()
    assert rig.of("a") == alone([5, 6, 7])


def test_a_long_prompt_is_chunked_and_decodes_go_on_beside_it() -> None:
    rig = Rig(budget=8)
    rig.add("short", [9], max_tokens=20, seed=3)
    rig.step()
    rig.add("long", list(range(3, 33)))
    plan = rig.step()
    assert plan is not None
    assert [len(chunk.token_ids) for chunk in plan.chunks] == [1, 7]
    rig.run()
    assert rig.of("short") == alone([9], 20, 3)
    assert rig.of("long") == alone(list(range(3, 33)))


def test_the_token_budget_holds() -> None:
    rig = Rig(budget=5)
    for number in range(8):
        rig.add(str(number), list(range(3, 9)), seed=number)
    while rig.scheduler.has_work:
        plan = rig.step()
        assert plan is None or plan.num_tokens <= 5
    assert [rig.of(str(n)) for n in range(8)] == [alone(list(range(3, 9)), seed=n) for n in range(8)]


def test_max_running_holds() -> None:
    rig = Rig(max_running=2)
    for number in range(5):
        rig.add(str(number), [number + 3])
    while rig.scheduler.has_work:
        rig.step()
        assert rig.scheduler.num_running <= 2
    assert len(rig.reasons) == 5


def test_preemption_gives_the_same_tokens_and_takes_the_latest() -> None:
    rig = Rig(num_pages=8, budget=32)
    prompts = {str(n): [n + 3] * 6 for n in range(4)}
    for key, prompt in prompts.items():
        rig.add(key, prompt, max_tokens=16)
    rig.run()
    assert rig.scheduler.preemptions > 0
    assert {key: rig.of(key) for key in prompts} == {key: alone(prompt, 16) for key, prompt in prompts.items()}


def test_low_priority_is_preempted_before_late_arrival() -> None:
    rig = Rig(num_pages=6, prefix=False)
    rig.add("unimportant", [3] * 8, max_tokens=8, ignore_eos=True, priority=1)
    rig.step()
    rig.add("important", [4] * 8, max_tokens=8, ignore_eos=True)
    finished: list[str] = []
    while rig.scheduler.has_work:
        rig.step()
        finished += [key for key, _ in rig.reasons if key not in finished]
    assert rig.scheduler.preemptions > 0
    assert finished == ["important", "unimportant"]
    assert len(rig.of("unimportant")) == 8


def test_priority_decides_who_is_admitted() -> None:
    rig = Rig(max_running=1)
    for key, priority in (("low", 5), ("high", -1), ("middle", 0)):
        rig.add(key, [7], max_tokens=1, priority=priority)
    rig.run()
    assert list(rig.answers) == [("high", 0), ("middle", 0), ("low", 0)]


def test_users_share_when_they_compete() -> None:
    rig = Rig(max_running=1, prefix=False)
    for number in range(6):
        rig.add(f"many{number}", [5] * 8, max_tokens=4, ignore_eos=True, user="many")
    for number in range(2):
        rig.add(f"few{number}", [6] * 8, max_tokens=4, ignore_eos=True, user="few")
    rig.run()
    order = [key for key, _ in rig.answers]
    assert order.index("few1") <= 4, order


def test_a_cached_prefix_is_not_computed_again() -> None:
    rig = Rig()
    prompt = list(range(3, 20))
    rig.add("cold", prompt)
    rig.run()
    before = rig.scheduler.prompt_tokens
    rig.add("warm", prompt)
    plan = rig.step()
    assert plan is not None
    assert plan.chunks[0].start == 16
    rig.run()
    assert rig.scheduler.prompt_tokens - before == 1
    assert rig.of("warm") == rig.of("cold") == alone(prompt)
    cached = [e.cached_tokens for e in rig.events if isinstance(e, TokenEvent) and e.request_id == "warm"]
    assert cached[0] == 16
    assert sum(cached) == 16


def test_a_prompt_that_is_cached_whole_computes_one_token_and_writes_nothing() -> None:
    rig = Rig()
    prompt = list(range(3, 19))  # four whole pages
    rig.add("cold", prompt)
    rig.run()
    rig.add("warm", prompt)
    plan = rig.step()
    assert plan is not None
    (chunk,) = plan.chunks
    assert (chunk.start, chunk.token_ids, chunk.num_stored) == (15, (18,), 1)
    rig.run()
    assert rig.of("warm") == alone(prompt)


def test_a_salt_keeps_prefixes_apart() -> None:
    rig = Rig()
    prompt = list(range(3, 20))
    for key, salt in (("a", "one"), ("b", "two"), ("c", "two")):
        rig.add(key, prompt, cache_salt=salt)
        rig.run()
    cached = {e.request_id: e.cached_tokens for e in reversed(rig.events) if isinstance(e, TokenEvent)}
    assert cached == {"a": 0, "b": 0, "c": 16}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("prompt_length", [1, 16, 19])
def test_choices_share_their_prompt(prompt_length: int, prefix: bool) -> None:
    rig = Rig(prefix=prefix)
    prompt = list(range(3, 3 + prompt_length))
    rig.add("r", prompt, n=4, seed=10, max_tokens=6)
    rig.run()
    assert [rig.of("r", choice) for choice in range(4)] == [alone(prompt, 6, 10 + choice) for choice in range(4)]
    shared = (prompt_length - 1) // 4 * 4 if prompt_length != 16 else 15
    assert rig.scheduler.prompt_tokens == prompt_length + 3 * (prompt_length - shared)


def test_choices_go_on_when_the_first_one_is_aborted() -> None:
    rig = Rig()
    rig.add("r", [5] * 30, n=3, max_tokens=6)
    rig.step()
    assert rig.scheduler.abort("r", 0)
    rig.run()
    assert [rig.of("r", choice) for choice in (1, 2)] == [alone([5] * 30, 6, choice) for choice in (1, 2)]


def test_an_aborted_request_gives_its_pages_back_and_no_event() -> None:
    rig = Rig(prefix=False)
    rig.add("a", list(range(3, 30)), max_tokens=50)
    rig.add("b", [4])
    rig.step()
    rig.step()
    assert rig.scheduler.abort("a")
    assert not rig.scheduler.abort("a")
    rig.run()
    assert ("a", 0) not in rig.answers
    assert rig.of("b") == alone([4])


def test_stop_token_ids_end_an_answer_and_ignore_eos_does_not() -> None:
    rig = Rig()
    tokens = alone([8], 30)
    rig.add("stop", [8], 30, stop_token_ids=(tokens[2],))
    rig.run()
    assert rig.of("stop") == tokens[: tokens.index(tokens[2]) + 1]
    assert [e.stop_reason for e in rig.events if isinstance(e, TokenEvent)][-1] == tokens[2]
    rig.add("on", [8], 200, ignore_eos=True)
    rig.run()
    assert len(rig.of("on")) == 200
    assert EOS in rig.of("on")
    assert rig.reasons == {("stop", 0): "stop", ("on", 0): "length"}


def test_logprobs_come_with_their_tokens() -> None:
    rig = Rig(budget=4)
    rig.add("warm", list(range(3, 14)))
    rig.run()
    rig.add("r", list(range(3, 14)), logprobs=0, prompt_logprobs=0)
    rig.run()
    events = [e for e in rig.events if isinstance(e, TokenEvent) and e.request_id == "r"]
    assert [[p.token_id for p in e.logprobs] for e in events] == [list(e.token_ids) for e in events]
    assert events[0].prompt_logprobs is not None
    assert [p and p.token_id for p in events[0].prompt_logprobs] == [None, *range(4, 14)]
    assert all(e.prompt_logprobs is None for e in events[1:])


def test_a_failed_sequence_fails_alone() -> None:
    rig = Rig()
    rig.add("bad", [3, 4])
    rig.add("good", [5, 6])
    rig.step()
    rig.group.fail_sequence = "its grammar has no answer"
    rig.step()
    rig.group.fail_sequence = None
    rig.run()
    assert rig.reasons["bad", 0] == "error"
    assert rig.of("good") == alone([5, 6])


def test_a_request_that_never_began_expires() -> None:
    rig = Rig(max_running=1)
    rig.add("runs", [3], max_tokens=40, ignore_eos=True, deadline_s=5.0)
    rig.step()
    rig.add("waits", [4], n=2, deadline_s=5.0)
    assert rig.scheduler.expire(4.9) == []
    events = rig.scheduler.expire(5.0)
    assert [(e.request_id, e.error) for e in events] == [("waits", "deadline")] * 2
    rig.run()
    assert list(rig.reasons) == [("runs", 0)]


def test_a_request_that_goes_on_without_its_first_choice_has_begun() -> None:
    rig = Rig()
    rig.add("r", [3], max_tokens=9, ignore_eos=True, n=2, deadline_s=2.0)
    rig.scheduler.abort("r", 0)
    rig.step()
    rig.step()
    assert rig.scheduler.expire(2.0) == []
    rig.run()
    assert len(rig.of("r", 1)) == 9


@pytest.mark.parametrize("pooling", ["last", "mean", "all"])
def test_encoding_goes_through_the_same_steps(pooling: Pooling) -> None:
    rig = Rig(budget=4)
    rig.add("r", [7], max_tokens=12, ignore_eos=True)
    rig.encode("e", range(3, 14), pooling)
    rig.run()
    (event,) = [e for e in rig.events if isinstance(e, EncodeEvent)]
    assert event.rows == tuple((float(token),) for token in range(3, 14))
    assert len(rig.of("r")) == 12


def test_pages_behind_the_window_are_given_back() -> None:
    rig = Rig(window=8, num_pages=8)
    prompt = list(range(3, 43))
    rig.add("long", prompt, max_tokens=40, ignore_eos=True)
    most = 0
    while rig.scheduler.has_work:
        rig.step()
        most = max(most, rig.pages_held)
    assert most <= 8 // 4 + 16 // 4 + 2
    tokens = list(prompt)
    for index in range(40):
        tokens.append(next_token(tokens[-8:], 0, index))
    assert rig.of("long") == tokens[len(prompt) :]


def test_a_lower_limit_sends_nobody_away_who_runs() -> None:
    rig = Rig(max_running=4)
    for number in range(6):
        rig.add(str(number), [number + 3], max_tokens=6, ignore_eos=True)
    rig.step()
    rig.scheduler.limit(SchedulerConfig(max_running=1, max_step_tokens=2))
    running = []
    while rig.scheduler.has_work:
        plan = rig.step()
        assert plan is None or plan.num_tokens <= 2
        running.append(rig.scheduler.num_running)
    assert running[0] == 4
    assert running[running.index(1) :].count(2) == 0, "one at a time once the first four are done"
    assert len(rig.reasons) == 6


def test_a_waiting_request_says_how_long_it_waited() -> None:
    rig = Rig(max_running=1)
    rig.add("first", [3], max_tokens=3, ignore_eos=True, n=2)
    rig.add("second", [4], max_tokens=3, ignore_eos=True)
    for _ in range(20):
        rig.now += 1.0
        rig.step()
    waited = [(e.request_id, e.choice, e.waited_s) for e in rig.events if isinstance(e, TokenEvent) and e.waited_s]
    assert [(key, choice) for key, choice, _ in waited] == [("first", 0), ("second", 0)]
    assert waited[0][2] == 1.0
    assert waited[1][2] is not None
    assert waited[1][2] > 3.0


def test_a_request_waits_once_however_often_it_is_preempted() -> None:
    rig = Rig(num_pages=9, budget=2, prefix=False)
    rig.add("important", [4] * 4, max_tokens=20, ignore_eos=True)
    rig.step()
    rig.step()
    rig.add("unimportant", [3] * 24, max_tokens=2, ignore_eos=True, priority=1)
    rig.now = 1.0
    rig.step()
    rig.now = 2.0
    rig.run()
    assert rig.scheduler.preemptions > 0
    waited = [e.waited_s for e in rig.events if isinstance(e, TokenEvent) and e.request_id == "unimportant"]
    assert waited == [1.0, None]


def test_a_sample_under_way_when_the_ranks_start_over_is_not_waited_for() -> None:
    rig = Rig(num_pages=6, prefix=False)
    for key in ("old", "young"):
        rig.add(key, [5] * 8, max_tokens=14, ignore_eos=True)
    while rig.scheduler.preemptions == 0:
        if len(rig.under_way) == 2:
            rig.take_in()
        rig.plan()
    rig.lose({0})
    rig.run()
    assert rig.of("old") == rig.of("young")
    assert len(rig.of("old")) == 14


def test_who_ran_when_the_ranks_were_lost_goes_on_before_anybody_new() -> None:
    rig = Rig(max_running=2, prefix=False)
    for key in ("a", "b"):
        rig.add(key, [5] * 8, max_tokens=30, ignore_eos=True, user="heavy")
    for _ in range(5):
        rig.step()
    rig.add("c", [6] * 8, max_tokens=4, ignore_eos=True, user="light")
    rig.lose({0})
    plan = rig.step()
    assert plan is not None
    assert [start.seq for start in plan.starts] == [0, 1]
    rig.run()


def test_an_older_prompt_takes_no_pages_from_whoever_is_in_the_step_already() -> None:
    rig = Rig(num_pages=9, budget=4, prefix=False)
    rig.add("decodes", [4], max_tokens=20, ignore_eos=True, priority=1)
    rig.step()
    rig.add("important", [3] * 28, max_tokens=2, ignore_eos=True)
    rig.run()
    assert len(rig.of("decodes")) == 20
    assert rig.of("important") == alone([3] * 28, 2)


def test_a_text_that_loses_its_pages_in_its_last_step_begins_again() -> None:
    preempted = 0
    for delay in range(12):
        rig = Rig(num_pages=7, prefix=False)
        rig.add("r", [4] * 8, max_tokens=20, ignore_eos=True)
        for _ in range(delay):
            rig.step()
        text = tuple(range(3, 18))
        rig.encode("e", text, priority=1)
        rig.run()
        (event,) = [e for e in rig.events if isinstance(e, EncodeEvent)]
        assert event.rows == tuple((float(token),) for token in text), delay
        preempted += rig.scheduler.preemptions
    assert preempted > 0


def test_routing_comes_with_its_token_to_whoever_asked() -> None:
    rig = Rig()
    rig.add("asked", [5, 6], max_tokens=4, ignore_eos=True, return_routing=True)
    rig.add("other", [5, 7], max_tokens=4, ignore_eos=True)
    rig.run()
    routed = {key: [e for e in rig.events if e.request_id == key] for key in ("asked", "other")}
    for event in routed["asked"]:
        assert isinstance(event, TokenEvent)
        assert event.routing == ((((event.token_ids[0] % 4, 0.75), (4, 0.25)),),)
    assert all(isinstance(event, TokenEvent) and event.routing == () for event in routed["other"])


def test_a_sequence_that_the_ranks_forgot_fails_alone() -> None:
    rig = Rig()
    rig.add("bad", [3, 4])
    rig.add("good", [5, 6])
    rig.step()
    plan = rig.under_way.popleft()
    result = rig.group.step(plan).result()
    left_out = replace(result, seqs=result.seqs[1:], token_ids=result.token_ids[1:])
    for event in rig.scheduler.postprocess(plan, left_out):
        if isinstance(event, TokenEvent) and event.finish_reason is None:
            rig.answers["good", 0] = list(event.token_ids)
        else:
            assert (event.request_id, event.error) == ("bad", "the ranks gave no token for it")
    rig.run()
    assert rig.of("good") == alone([5, 6])


def test_whatever_is_wrong_with_one_sequence_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Sequence.take

    def fails_for_one(sequence: Sequence, *rest: Any) -> TokenEvent:
        if sequence.key == "bad":
            raise KeyError("what nobody thought of")
        return take(sequence, *rest)

    monkeypatch.setattr(Sequence, "take", fails_for_one)
    rig = Rig()
    rig.add("bad", [3, 4], n=2)
    rig.add("good", [5, 6])
    rig.run()
    assert rig.of("good") == alone([5, 6])
    errors = [(e.choice, e.error) for e in rig.events if isinstance(e, TokenEvent) and e.request_id == "bad"]
    assert errors == [(choice, "internal error; the server's log says more") for choice in (0, 1)]


def test_a_pause_moves_the_deadlines_of_those_who_wait() -> None:
    rig = Rig(max_running=1)
    rig.add("runs", [3], max_tokens=40, ignore_eos=True)
    rig.step()
    rig.add("before", [4], deadline_s=5.0)
    rig.scheduler.move_deadlines(10.0)
    rig.add("after", [4], deadline_s=12.0)
    assert rig.scheduler.expire(11.9) == []
    assert [event.request_id for event in rig.scheduler.expire(14.9)] == ["after"]
    assert [event.request_id for event in rig.scheduler.expire(15.0)] == ["before"]


@pytest.mark.parametrize("seed", range(10))
def test_random_histories_give_everyone_what_they_get_alone(seed: int) -> None:
    chance = random.Random(seed)
    window = chance.choice([None, None, 8])
    rig = Rig(
        num_pages=chance.randint(14, 40), budget=chance.randint(1, 20), max_running=chance.randint(1, 6), window=window
    )
    wanted: dict[tuple[str, int], list[int]] = {}
    aborted: set[str] = set()
    for number in range(60):
        prompt = [chance.randint(3, 5) for _ in range(chance.randint(1, 24))]  # few tokens: many shared prefixes
        max_tokens, n = chance.randint(1, 20), chance.choice([1, 1, 3])
        extra = {"prompt_logprobs": 0} if chance.random() < 0.2 else {}
        rig.add(
            str(number),
            prompt,
            max_tokens,
            number,
            n=n,
            user=chance.choice("ab"),
            priority=chance.choice([0, 0, 1]),
            **extra,
        )
        wanted |= {(str(number), c): alone(prompt, max_tokens, number + c, window) for c in range(n)}
        for _ in range(chance.randint(0, 4)):
            rig.step()
        if chance.random() < 0.1:
            victim = str(chance.randint(0, number))
            if rig.scheduler.abort(victim):
                aborted.add(victim)
            rig.scheduler.check_integrity()
    rig.run()
    for (key, choice), tokens in wanted.items():
        got = rig.answers.get((key, choice), [])
        assert got == tokens[: len(got)], f"seed {seed}, request {key}, choice {choice}"
        assert key in aborted or got == tokens, f"seed {seed}, request {key}, choice {choice}"
