"""What happens in one data group leaves the others alone."""

from __future__ import annotations

from cluster.messages import EncodeEvent, TokenEvent
from tests.fake_group import next_token
from tests.unit.scheduler_rig import Rig, alone

PROMPT = list(range(3, 23))  # five pages


def endless(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """What a request gets alone whose answer ends at nothing but its length."""
    tokens = list(prompt)
    for index in range(count):
        tokens.append(next_token(tokens, seed, index))
    return tokens[len(prompt) :]


def test_every_group_has_the_whole_budget() -> None:
    rig = Rig(groups=2, budget=8)
    rig.add("a", [5] * 20)
    rig.add("b", [6] * 6)
    plan = rig.step()
    assert plan is not None
    assert [len(chunk.token_ids) for chunk in plan.chunks] == [8, 6]
    assert plan.group_tokens == (8, 6)
    rig.run()
    assert rig.of("a") == alone([5] * 20)


def test_chunks_come_group_by_group_whoever_was_admitted_first() -> None:
    rig = Rig(groups=2, prefix=False)
    for number in range(5):
        rig.add(str(number), [number + 3] * 3, max_tokens=10, ignore_eos=True)
    rig.step()
    plan = rig.step()
    assert plan is not None
    assert [chunk.seq for chunk in plan.chunks] == [0, 2, 4, 1, 3]
    assert plan.group_tokens == (3, 2)


def test_an_idle_group_has_no_tokens() -> None:
    rig = Rig(groups=3)
    rig.add("alone", [3, 4])
    plan = rig.step()
    assert plan is not None
    assert plan.group_tokens == (2, 0, 0)


def test_nobody_loses_pages_to_another_group() -> None:
    rig = Rig(groups=2, num_pages=6, prefix=False, budget=32)
    rig.add("unimportant", [3] * 16, max_tokens=8, ignore_eos=True, priority=2)  # fills its group
    rig.step()
    rig.add("old", [4] * 8, max_tokens=12, ignore_eos=True)
    rig.add("young", [5] * 8, max_tokens=12, ignore_eos=True)
    starts = [start for _ in range(60) if (plan := rig.step()) is not None for start in plan.starts]
    assert rig.scheduler.preemptions == 1
    assert [(start.seq, start.group) for start in starts] == [(1, 1), (2, 1), (2, 0)]
    assert not rig.scheduler.has_work
    assert [len(rig.of(key)) for key in ("unimportant", "old", "young")] == [8, 12, 12]


def test_whoever_was_preempted_may_go_to_another_group() -> None:
    rig = Rig(groups=2, num_pages=8, prefix=False, budget=64)
    rig.add("a", [3] * 12, max_tokens=20, ignore_eos=True)
    rig.add("short", [4] * 12, max_tokens=4, ignore_eos=True)
    rig.step()
    rig.add("b", [5] * 12, max_tokens=16, ignore_eos=True, seed=5)
    groups: list[int] = []
    while rig.scheduler.has_work:
        plan = rig.step()
        groups += [start.group for start in plan.starts if start.seq == 2] if plan is not None else []
    assert set(groups) == {0, 1}
    assert rig.of("b") == endless([5] * 12, 16, 5)


def test_a_group_that_lost_no_rank_computes_nothing_again() -> None:
    rig = Rig(groups=2, budget=64)
    rig.add("lost", PROMPT, max_tokens=12, ignore_eos=True)
    rig.add("kept", PROMPT[::-1], max_tokens=12, ignore_eos=True)
    for _ in range(5):
        rig.step()
    known = len(rig.of("kept"))
    rig.lose({0}, steps_done=1)
    plan = rig.step()
    assert plan is not None
    assert plan.step == 0
    assert plan.releases == ()
    again = {start.seq: start for start in plan.starts}
    chunks = {chunk.seq: chunk for chunk in plan.chunks}
    assert (again[0].group, chunks[0].start) == (0, 0)
    assert (again[1].group, chunks[1].start) == (1, len(PROMPT) + known - 1)
    assert len(chunks[1].new_pages) >= 5, "the whole page table"
    assert again[1].token_ids == (*PROMPT[::-1], *rig.of("kept"))
    rig.run()
    assert rig.of("kept") == endless(PROMPT[::-1], 12)
    assert rig.of("lost") == endless(PROMPT, 12)


def test_a_prefix_stays_where_no_rank_was_lost() -> None:
    rig = Rig(groups=2, budget=64)
    rig.add("a", PROMPT, max_tokens=2)
    rig.add("b", PROMPT[::-1], max_tokens=2)
    rig.run()
    rig.lose({0})
    for key, prompt in (("a again", PROMPT), ("b again", PROMPT[::-1])):
        rig.add(key, prompt, max_tokens=2)
    rig.run()
    cached = {e.request_id: e.cached_tokens for e in reversed(rig.events) if isinstance(e, TokenEvent)}
    assert (cached["a again"], cached["b again"]) == (0, 19)


def test_shared_pages_are_not_written_even_if_the_first_step_was_void() -> None:
    rig = Rig(groups=2)
    rig.add("cold", PROMPT, max_tokens=2)
    rig.run()
    rig.add("warm", PROMPT, max_tokens=2)
    first = rig.step()
    rig.lose({1})
    second = rig.step()
    for plan in (first, second):
        assert plan is not None
        (chunk,) = plan.chunks
        assert (chunk.start, chunk.token_ids, chunk.num_stored) == (19, (22,), 1)
    rig.run()


def test_a_text_that_is_encoded_begins_again() -> None:
    rig = Rig(groups=2, budget=4)
    rig.encode("e", range(3, 14), "mean")
    rig.step()
    rig.step()
    rig.lose({1})
    plan = rig.step()
    assert plan is not None
    assert plan.chunks[0].start == 0
    rig.run()
    (event,) = rig.events
    assert isinstance(event, EncodeEvent)
    assert event.rows == tuple((float(token),) for token in range(3, 14))
