"""Page tables as runs."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import page_runs


def test_the_example_of_the_docstring() -> None:
    assert page_runs([4, 5, 6, 9]) == ((4, 3), (9, 1))
    assert page_runs([]) == ()


@settings(deadline=None)
@given(st.lists(st.integers(0, 9)))
def test_runs_spell_the_pages_and_are_as_few_as_can_be(pages: list[int]) -> None:
    runs = page_runs(pages)
    assert [page for first, count in runs for page in range(first, first + count)] == pages
    assert all(first + count != following for (first, count), (following, _) in pairwise(runs))
