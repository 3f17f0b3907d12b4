"""Split decode attention over pages against softmax attention, for any lengths, page tables, windows and splits."""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels import paged_decode as kernel
from model.kernels.paged_decode import PageTable, paged_decode, splits_for


def reference(query_HC: Tensor, key_MGC: Tensor, value_MGC: Tensor) -> Tensor:
    """One row's softmax over all keys given, in float64."""
    queries = len(query_HC) // key_MGC.shape[1]
    key_HMC, value_HMC = (x.double().transpose(0, 1).repeat_interleave(queries, dim=0) for x in (key_MGC, value_MGC))
    scores_HM = (query_HC.double()[:, None] * key_HMC).sum(-1) * query_HC.shape[-1] ** -0.5
    return (scores_HM.softmax(-1)[..., None] * value_HMC).sum(1)


@pytest.mark.parametrize("seed", range(60 if os.environ.get("MIXTRAL_TEST_ALL") else 8))
def test_it_is_attention(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that short texts have many splits and splits many blocks."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float16])
    monkeypatch.setattr(kernel, "KEYS", 16)
    monkeypatch.setattr(kernel, "SMALLEST_SPLIT", rng.choice([1, 16, 40]))
    G, C, page_size = rng.randint(1, 3), rng.choice([6, 16, 20]), rng.choice([1, 4, 6, 16])
    H, splits = G * rng.choice([1, 3, 4, 17]), rng.choice([1, 2, 8])
    window = rng.choice([None, None, 1, 5, 33])
    contexts = [rng.choice([1, 2, rng.randint(1, 60)]) for _ in range(rng.randint(1, 3))]
    counts = [-(-context // page_size) for context in contexts]
    free = list(range(sum(counts) + 2))
    rng.shuffle(free)
    owned = [[free.pop() for _ in range(count)] for count in counts]
    # What no sequence owns must not be read: it would show.
    memory = tuple(torch.full(((sum(counts) + 2) * page_size, G, C), torch.nan, dtype=dtype) for _ in range(2))
    query_BHC = torch.randn(len(contexts), H, C, generator=generator).to(dtype)
    expected = []
    for query_HC, pages, context in zip(query_BHC, owned, contexts, strict=True):
        oldest = 0 if window is None else max(0, context - window)
        position = torch.arange(oldest, context)
        slots = torch.tensor(pages)[position // page_size] * page_size + position % page_size
        for x_NGC in memory:
            x_NGC[slots] = torch.randn(len(slots), G, C, generator=generator).to(dtype)
        expected.append(reference(query_HC, memory[0][slots], memory[1][slots]))
    begins = [sum(counts[:i]) for i in range(len(counts))]
    tensors = ([page for pages in owned for page in pages], begins, contexts)
    table = PageTable(*(torch.tensor(x, dtype=torch.int32) for x in tensors))
    found = paged_decode(query_BHC, (memory[0], memory[1]), table, page_size=page_size, window=window, splits=splits)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=tolerance, atol=tolerance)


def test_as_many_splits_as_keep_the_device_busy() -> None:
    assert splits_for(1, 8, 132) == 64
    assert splits_for(16, 8, 132) == 8
    assert splits_for(256, 8, 132) == 8
    assert all(splits_for(n, g, p).bit_count() == 1 for n in (1, 3, 77) for g in (1, 8) for p in (20, 84, 132))
