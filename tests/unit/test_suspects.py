"""Who is blamed for a crash: the one that is there every time, and nobody before it was alone."""

from __future__ import annotations

import random

import pytest

from cluster.suspects import Suspects


def test_one_crash_blames_nobody() -> None:
    suspects = Suspects()
    assert suspects.crashed(["a", "b"]) is None
    assert suspects.alone is None


def test_who_was_in_two_crashes_is_tried_alone_and_blamed_for_the_third() -> None:
    suspects = Suspects()
    suspects.crashed(["a", "b"])
    suspects.crashed(["b", "c"])
    assert suspects.alone == "b"
    assert suspects.crashed(["b"]) == "b"
    assert suspects.alone is None


def test_a_request_that_is_always_alone_has_three_lives_too() -> None:
    suspects = Suspects()
    assert [suspects.crashed(["a"]) for _ in range(3)] == [None, None, "a"]


def test_a_token_clears_the_innocent_one_after_the_other() -> None:
    suspects = Suspects()
    for _ in range(2):
        suspects.crashed(["a", "b", "c"])
    tried = []
    while (key := suspects.alone) is not None:
        tried.append(key)
        suspects.cleared([key])
    assert tried == ["a", "b", "c"]


def test_crashes_in_company_never_convict() -> None:
    suspects = Suspects()
    assert [suspects.crashed(["a", "b"]) for _ in range(5)] == [None] * 5
    assert suspects.alone == "a"


def test_requests_that_are_gone_are_not_waited_for() -> None:
    suspects = Suspects()
    for _ in range(2):
        suspects.crashed(["a", "b"])
    suspects.forget_all_but({"b", "z"})
    assert suspects.alone == "b"
    suspects.forget_all_but({"z"})
    assert suspects.alone is None


@pytest.mark.parametrize("seed", range(50))
def test_among_many_exactly_the_culprits_are_found(seed: int) -> None:
    """Steps of random requests crash if a bad one is in them; every other step clears those in it."""
    chance = random.Random(seed)
    alive = [f"r{n}" for n in range(16)]
    bad = set(chance.sample(alive, chance.randint(1, 3)))
    suspects, convicted, crashes = Suspects(), set(), 0
    while bad - convicted:
        alone = suspects.alone
        step = [alone] if alone is not None else chance.sample(alive, chance.randint(1, len(alive)))
        if bad.isdisjoint(step):
            suspects.cleared(step)
            continue
        crashes += 1
        culprit = suspects.crashed(step)
        if culprit is not None:
            convicted.add(culprit)
            alive.remove(culprit)
    assert convicted == bad, f"seed {seed}"
    assert crashes <= 4 * len(bad), f"seed {seed}: everybody waited for {crashes} recoveries"
