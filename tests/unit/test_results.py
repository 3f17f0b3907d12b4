from __future__ import annotations

from cluster.messages import StepResult, StepTimes, TokenLogprob
from cluster.placement import even_placement
from cluster.results import merge

ONE = TokenLogprob(5, -0.5, 1, ())


def test_groups_follow_one_another_and_others_say_nothing() -> None:
    quiet = StepResult(4, (), (), StepTimes(router=9.0))
    first = StepResult(4, (1, 3), (50, 51), StepTimes(head=1.0), {1: ONE}, {3: (ONE,)}, failed={3: "why"}, graph=True)
    second = StepResult(4, (2,), (52,), StepTimes(head=2.0), pooled={8: ((0.5,),)}, routing={2: (((0, 1.0),),)})
    assert merge([first, quiet, second, quiet], even_placement(1, 4, 4)) == StepResult(
        4,
        (1, 3, 2),
        (50, 51, 52),
        StepTimes(head=1.0),
        {1: ONE},
        {3: (ONE,)},
        {8: ((0.5,),)},
        {3: "why"},
        {2: (((0, 1.0),),)},
        graph=True,
    )


def test_a_slot_is_counted_once_whatever_its_slices() -> None:
    results = [StepResult(0, (), (), StepTimes(), slot_rows=((n, n + 1), (0, n))) for n in (1, 1, 5, 5)]
    assert merge(results, even_placement(2, 4, 4, slices=2)).slot_rows == ((1, 2, 5, 6), (0, 1, 0, 5))
    whole = merge(results, even_placement(2, 8, 4)).slot_rows
    assert whole == ((1, 2, 1, 2, 5, 6, 5, 6), (0, 1, 0, 1, 0, 5, 0, 5))
