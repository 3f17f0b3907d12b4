"""Pooling gives the same however the text was cut into chunks, and what it says of the whole."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from model.pooling import Pool, Pooling, wanted_rows


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["last", "mean", "all"])
def test_chunks_pool_to_what_the_whole_does(seed: int, dtype: torch.dtype, pooling: Pooling) -> None:
    rng = random.Random(seed)
    length = rng.randint(1, 40)
    rows_TD = torch.randn(length, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    cuts = sorted({0, length, *rng.choices(range(length), k=3)})
    pool = Pool(pooling)
    for first, last in pairwise(cuts):
        wanted = wanted_rows(pooling, range(first, last), ends_text=last == length)
        pool = pool.add(rows_TD[wanted.start : wanted.stop])
    expected = {"last": rows_TD[-1:], "mean": rows_TD.double().mean(0, keepdim=True), "all": rows_TD}[pooling].float()
    assert pool.result().dtype == torch.float32
    torch.testing.assert_close(pool.result(), expected, rtol=1e-7, atol=0)


def test_only_the_rows_that_count_are_computed() -> None:
    chunk = range(5, 9)
    assert list(wanted_rows("last", chunk, ends_text=False)) == []
    assert list(wanted_rows("last", chunk, ends_text=True)) == [8]
    assert wanted_rows("mean", chunk, ends_text=False) == wanted_rows("all", chunk, ends_text=True) == chunk


def test_adding_leaves_the_pool_as_it_was() -> None:
    first = Pool("mean").add(torch.ones(2, 3))
    first.add(torch.zeros(2, 3))
    assert first.result().tolist() == [[1.0, 1.0, 1.0]]
