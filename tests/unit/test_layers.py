"""The linear map in the layouts of torch, and the norm."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from model import layers
from model.layers import PackedLinear, can_pack, make_linear, rms_norm


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Without the compiled kernels, which have tests of their own."""
    monkeypatch.setattr(layers, "has_kernel", lambda weight: False)
    if not request.param:
        monkeypatch.setattr(layers, "has_operator", lambda weight: False)
    return bool(request.param)


@pytest.mark.parametrize("rows", [0, 1, 3, 32, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_linear_multiplies_with_the_transpose(packing: bool, rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight_OI = (torch.randn(40, 24, generator=generator) / 5).to(dtype)
    x_TI = torch.randn(rows, 24, generator=generator).to(dtype)
    linear = make_linear(weight_OI.clone())
    assert isinstance(linear, PackedLinear) == can_pack(weight_OI)
    assert (linear.in_features, linear.out_features) == (24, 40)
    torch.testing.assert_close(linear(x_TI), functional.linear(x_TI, weight_OI), rtol=tolerance, atol=tolerance)
    assert torch.equal(linear.weight_OI, weight_OI)
    assert linear.nbytes == weight_OI.nbytes


def test_linear_takes_rows_that_are_not_contiguous(packing: bool) -> None:
    torch.manual_seed(0)
    weight_OI, wide = torch.randn(8, 6), torch.randn(4, 12)
    torch.testing.assert_close(make_linear(weight_OI)(wide[:, 3:9]), wide[:, 3:9] @ weight_OI.T)


def test_only_one_copy_of_a_weight_is_kept() -> None:
    weight_OI = torch.ones(8, 6)
    linear = make_linear(weight_OI)
    assert isinstance(linear, PackedLinear) == can_pack(weight_OI)
    kept = linear._packed if isinstance(linear, PackedLinear) else linear.weight_OI
    assert kept.is_mkldnn or kept is weight_OI


@pytest.mark.parametrize(
    "weight_OI", [torch.zeros(4, 4, dtype=torch.float16), torch.zeros(4, 4, device="meta"), torch.zeros(0, 4)]
)
def test_what_cannot_be_packed_stays_plain(weight_OI: torch.Tensor) -> None:
    assert not can_pack(weight_OI)
    assert make_linear(weight_OI).weight_OI is weight_OI


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = (torch.randn(7, 32, generator=generator) * 9).to(dtype)
    weight_D = torch.randn(32, generator=generator).to(dtype)
    theirs = MixtralRMSNorm(32, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(weight_D)
    assert torch.equal(rms_norm(x_TD, weight_D, 1e-5), theirs(x_TD).detach())
    assert rms_norm(x_TD[:0], weight_D, 1e-5).shape == (0, 32)
