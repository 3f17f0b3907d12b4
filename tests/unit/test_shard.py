"""Slices of an expert: every row in exactly one of them."""

from __future__ import annotations

import pytest

from model.errors import ConfigError
from model.shard import Shard


@pytest.mark.parametrize(("width", "slices"), [(96, 1), (96, 2), (7, 2), (97, 4), (5, 5)])
def test_slices_cover_an_expert_once(width: int, slices: int) -> None:
    parts = [Shard(expert_slice=part, expert_slices=slices).ffn_rows(width) for part in range(slices)]
    assert [row for part in parts for row in part] == list(range(width))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_slices_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 slices of each expert do not fit intermediate_size 7"):
        Shard(expert_slice=0, expert_slices=8).ffn_rows(7)
