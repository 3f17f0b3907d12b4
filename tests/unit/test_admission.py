"""Which data group a sequence goes to, seen in what the scheduler plans."""

from __future__ import annotations

import pytest

from cluster.admission import CROWD
from cluster.messages import StepPlan
from tests.unit.scheduler_rig import Rig, alone

PROMPT = list(range(3, 23))  # five pages


def groups_of(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [start.group for start in plan.starts]


def test_the_emptiest_group_the_first_where_all_are_alike() -> None:
    rig = Rig(groups=3)
    for number in range(6):
        rig.add(str(number), [number + 3] * 5)
    assert sorted(groups_of(rig.step())) == [0, 0, 1, 1, 2, 2]
    rig.run()
    assert [rig.of(str(n)) for n in range(6)] == [alone([n + 3] * 5) for n in range(6)]


def test_where_its_prefix_is() -> None:
    rig = Rig(groups=2, budget=64)
    rig.add("elsewhere", [9] * 4, max_tokens=30, ignore_eos=True)
    rig.add("first", PROMPT, max_tokens=1)
    assert groups_of(rig.step()) == [0, 1]
    rig.step()
    rig.step()
    rig.add("busy", [8] * 4 * 8, max_tokens=30, ignore_eos=True)  # group 1 has fewer free pages now
    assert groups_of(rig.step()) == [1]
    rig.add("again", PROMPT)
    plan = rig.step()
    assert groups_of(plan) == [1]
    rig.run()
    assert rig.of("again") == alone(PROMPT)


def test_not_where_there_is_no_room_for_the_rest() -> None:
    rig = Rig(groups=2, num_pages=12, budget=64)
    rig.add("first", PROMPT, max_tokens=1)
    rig.run()
    rig.add("large", [*PROMPT, *range(30, 42)], max_tokens=4, ignore_eos=True)
    assert groups_of(rig.step()) == [0], "its prefix is there"
    rig.add("again", [*PROMPT, 50], max_tokens=3, ignore_eos=True)
    assert groups_of(rig.step()) == [0], "pages are shared"
    rig.add("too long", [*PROMPT, *range(40, 52)], max_tokens=4, ignore_eos=True)
    assert groups_of(rig.step()) == [1]
    rig.run()
    assert rig.scheduler.preemptions == 0


def test_prompts_that_begin_alike_do_not_all_crowd_into_one_group() -> None:
    rig = Rig(groups=2, num_pages=512, budget=256, max_running=64)
    rig.add("first", PROMPT, max_tokens=1)
    rig.run()
    for number in range(2 * CROWD + 6):
        rig.add(str(number), [*PROMPT, 30 + number % 9], max_tokens=12, ignore_eos=True, seed=number)
    placed = groups_of(rig.step())
    assert placed[:CROWD] == [0] * CROWD
    assert placed.count(0) - placed.count(1) in (CROWD - 1, CROWD)
    rig.run()
    assert rig.of("7") == alone([*PROMPT, 37], 12, 7)


def test_choices_go_where_their_prompt_is() -> None:
    for prefix in (True, False):
        rig = Rig(groups=2, num_pages=128, budget=64, max_running=64, prefix=prefix)
        rig.add("other", [9] * 4, max_tokens=20, ignore_eos=True)
        rig.add("r", PROMPT, n=CROWD + 4, max_tokens=5, ignore_eos=True)
        leader = groups_of(rig.step())
        assert leader == [0, 1]
        plans = [rig.step(), rig.step()]
        followers = [group for plan in plans for group in groups_of(plan)]
        assert followers == [1] * (CROWD + 3)
        rig.run()
        assert rig.scheduler.prompt_tokens == 4 + len(PROMPT) + CROWD + 3
        assert rig.of("r", CROWD) == alone(PROMPT, 5, CROWD)


@pytest.mark.parametrize(("num_pages", "group"), [(64, 1), (11, 0)])
def test_a_choice_waits_where_its_prompt_is_for_tokens_but_not_for_pages(num_pages: int, group: int) -> None:
    rig = Rig(groups=2, num_pages=num_pages, budget=8, prefix=False)
    rig.add("elsewhere", [9] * 20, max_tokens=20, ignore_eos=True)
    rig.add("r", PROMPT[:8], n=2, max_tokens=30, ignore_eos=True)
    rig.step()
    rig.step()
    rig.add("long", [7] * 30, max_tokens=14, ignore_eos=True, priority=-1)  # takes what each step has left
    assert groups_of(rig.step()) == [1]
    starts = [start for _ in range(12) if (plan := rig.step()) is not None for start in plan.starts]
    assert [(rig.owners[start.seq], start.group) for start in starts] == [("r", group)]
    rig.run()
    assert len(rig.of("r", 1)) == 30


def test_no_more_run_in_a_group_than_a_step_has_tokens() -> None:
    rig = Rig(groups=2, budget=3, max_running=64)
    for number in range(12):
        rig.add(str(number), [number + 3], max_tokens=9, ignore_eos=True)
    most = 0
    while rig.scheduler.has_work:
        plan = rig.step()
        assert plan is None or max(plan.group_tokens) <= 3
        most = max(most, rig.scheduler.num_running)
    assert most == 6
