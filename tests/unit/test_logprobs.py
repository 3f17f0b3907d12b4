"""Log-probabilities against sorting the softmax of one row at a time."""

from __future__ import annotations

import math

import pytest
import torch

from model.logprobs import logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [0, 1, 5, 40])
def test_equals_the_plain_version(dtype: torch.dtype, top: int) -> None:
    """bfloat16 logits are full of ties."""
    generator = torch.Generator().manual_seed(top)
    logits_RV = (torch.randn(8, 40, generator=generator) * 3).to(dtype)
    logits_RV[0] = 0.0
    logits_RV[1, ::2] = -torch.inf
    ids_R = torch.randint(0, 40, (8,), generator=generator)
    result = logprobs(logits_RV, ids_R, top)
    for r, (logits, token_id) in enumerate(zip(logits_RV.double().tolist(), ids_R.tolist(), strict=True)):
        normalizer = math.log(math.fsum(math.exp(logit) for logit in logits))
        order = sorted(range(40), key=lambda v: (-logits[v], v))[:top]
        assert result.top_ids_RN[r].tolist() == order
        expected = torch.tensor([logits[v] - normalizer for v in (token_id, *order)], dtype=torch.float32)
        torch.testing.assert_close(torch.cat([result.chosen_R[r : r + 1], result.top_RN[r]]), expected)
        assert result.rank_R[r] == 1 + sum(logit > logits[token_id] for logit in logits)


def test_a_certain_token_has_probability_one() -> None:
    logits_RV = torch.full((1, 5), -torch.inf)
    logits_RV[0, 3] = -7.0
    result = logprobs(logits_RV, torch.tensor([3]), 2)
    assert result.chosen_R.tolist() == [0.0]
    assert result.top_ids_RN.tolist() == [[3, 0]]
