"""Attention of several chunks in one call, by its definition; flash kernels are held against it in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.varlen_attention import Chunks, masked_attention, varlen_attention_for


def reference(query_HC: Tensor, key_MGC: Tensor, value_MGC: Tensor) -> Tensor:
    """One row's softmax over all keys given, in float64."""
    queries = len(query_HC) // key_MGC.shape[1]
    key_HMC, value_HMC = (x.double().transpose(0, 1).repeat_interleave(queries, dim=0) for x in (key_MGC, value_MGC))
    weights_HM = ((query_HC.double()[:, None] * key_HMC).sum(-1) * query_HC.shape[-1] ** -0.5).softmax(-1)
    return (weights_HM[..., None] * value_HMC).sum(1)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_each_row_sees_the_keys_up_to_itself(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, keys, H, G, C = (1, 4, 5), (7, 4, 12), 6, 2, 10
    query_LHC = torch.randn(sum(rows), H, C, generator=generator)
    key_MGC, value_MGC = torch.randn(2, sum(keys), G, C, generator=generator)
    borders = [torch.tensor([0, *counts]).cumsum(0).int() for counts in (rows, keys)]
    found_LHC = masked_attention(query_LHC, key_MGC, value_MGC, Chunks(rows, keys, *borders), window)
    row = 0
    for length, context, end in zip(rows, keys, torch.tensor(keys).cumsum(0).tolist(), strict=True):
        for seen in range(context - length + 1, context + 1):
            last = end - context + seen
            sight = slice(last - min(seen, window or seen), last)
            expected_HC = reference(query_LHC[row], key_MGC[sight], value_MGC[sight])
            torch.testing.assert_close(found_LHC[row].double(), expected_HC, rtol=1e-5, atol=1e-5)
            row += 1
    assert row == sum(rows)


def test_a_cpu_has_the_definition() -> None:
    assert varlen_attention_for(torch.device("cpu"), torch.bfloat16, 128) is masked_attention
