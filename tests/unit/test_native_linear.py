"""Linear maps and experts by the compiled kernels, beside torch in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.layers import make_linear
from model.moe import reference_experts
from model.native import library
from model.native.linear import NativeExperts, NativeLinear, has_kernel
from model.weights import ExpertWeights

compiled = pytest.mark.skipif(
    not library.has_kernels(), reason="no C compiler at installation, or no AVX-512 with BF16 in this processor"
)
# A sum's own rounding, and that of what is kept of it.
TOLERANCE = {"rtol": 2**-8, "atol": 2**-8}


def random(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (values / shape[-1] ** 0.25).bfloat16()


@compiled
@pytest.mark.parametrize("rows", [0, 1, 2, 11, 12, 13, 24, 25, 37, 100, 700])
@pytest.mark.parametrize(("features_in", "features_out"), [(2, 32), (24, 96), (62, 64), (1030, 32)])
def test_a_kernel_multiplies_as_float64_does(threads: int, rows: int, features_in: int, features_out: int) -> None:
    weight_OI, x_TI = random(features_out, features_in), random(rows, features_in, seed=1)
    linear = make_linear(weight_OI.clone())
    assert isinstance(linear, NativeLinear)
    expected_TO = (x_TI.double() @ weight_OI.double().T).bfloat16()
    torch.testing.assert_close(linear(x_TI), expected_TO, **TOLERANCE)
    assert torch.equal(linear.weight_OI, weight_OI)
    assert linear.nbytes == weight_OI.nbytes


@compiled
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(threads: int) -> None:
    linear, x_TI = NativeLinear(random(64, 200)), random(300, 200, seed=1)
    alone_TO = torch.cat([linear(row_1I) for row_1I in x_TI.split(1)])
    for size in (5, 12, 40, 300):
        assert torch.equal(torch.cat([linear(part) for part in x_TI.split(size)]), alone_TO)


@compiled
def test_the_last_output_features_are_had_alone(threads: int) -> None:
    linear, x_TI = NativeLinear(random(96, 30)), random(5, 30, seed=1)
    assert torch.equal(linear.from_feature(32, x_TI), linear(x_TI)[:, 32:])
    with pytest.raises(AssertionError):
        linear.from_feature(16, x_TI)


@compiled
def test_rows_may_lie_apart() -> None:
    linear, wide = NativeLinear(random(32, 6)), random(5, 40)
    assert torch.equal(linear(wide[:, 3:9]), linear(wide[:, 3:9].contiguous()))
    assert torch.equal(linear(wide[:, ::5][:, :6]), linear(wide[:, ::5][:, :6].contiguous()))


@compiled
@pytest.mark.parametrize("rows", [[1, 0, 0], [0, 0, 0], [3, 0, 50], [400, 13, 1], [12, 24, 36]])
@pytest.mark.parametrize(("D", "F"), [(32, 16), (64, 48), (96, 1008)])
def test_experts_in_one_call_are_the_experts_one_by_one(threads: int, rows: list[int], D: int, F: int) -> None:
    gate_up = [random(2 * F, D, seed=2 * slot) for slot in range(3)]
    down = [random(D, F, seed=2 * slot + 1) for slot in range(3)]
    x_ND = random(sum(rows), D, seed=9)
    expert_N1 = torch.repeat_interleave(torch.arange(3), torch.tensor(rows))[:, None]
    oracle = [ExpertWeights(_Exact(g), _Exact(d)) for g, d in zip(gate_up, down, strict=True)]
    expected_ND = reference_experts(x_ND.float(), expert_N1, torch.ones(len(x_ND), 1), oracle)
    experts = NativeExperts([NativeLinear(g) for g in gate_up], [NativeLinear(d) for d in down])
    y_ND = experts(x_ND, rows)
    assert y_ND.dtype == torch.bfloat16
    scale = expected_ND.abs().max().item() if len(x_ND) else 1.0
    torch.testing.assert_close(y_ND.float(), expected_ND, rtol=2**-6, atol=2**-7 * scale)


class _Exact:
    """As the oracle reads an expert."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI.float()


@compiled
def test_silu_is_right_to_the_last_bit_but_one_wherever_it_is_asked() -> None:
    gate_N = torch.cat([torch.linspace(-100, 100, 801), torch.linspace(-1, 1, 1999).pow(5)]).bfloat16()
    # What comes out is silu of the first input times the second.
    gate_up_OD, down_DF = torch.zeros(32, 32), torch.zeros(32, 16)
    gate_up_OD[0, 0] = gate_up_OD[16, 1] = down_DF[0, 0] = 1
    x_ND = torch.zeros(len(gate_N), 32, dtype=torch.bfloat16)
    x_ND[:, 0], x_ND[:, 1] = gate_N, 1
    experts = NativeExperts([NativeLinear(gate_up_OD.bfloat16())], [NativeLinear(down_DF.bfloat16())])
    expected_N = torch.nn.functional.silu(gate_N.double()).bfloat16()
    torch.testing.assert_close(experts(x_ND, [len(x_ND)])[:, 0], expected_N, rtol=2**-8, atol=3e-37)
    x_ND[:, 0], x_ND[:, 1] = -1e20, 1e30  # whose product is no float
    assert not experts(x_ND, [len(x_ND)])[:, 0].any()


@compiled
def test_what_fits_no_panel_has_no_kernel() -> None:
    assert has_kernel(random(32, 2))
    assert not any(map(has_kernel, (random(48, 2), random(32, 3), random(32, 2).float(), random(32, 2).to("meta"))))
    assert not has_kernel(torch.empty(32, 0, dtype=torch.bfloat16))


def test_why_there_are_none_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "install a C compiler" in str(library.open_library(tmp_path))
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    assert "do not load" in str(library.open_library(tmp_path))
    (tmp_path / "maps").write_text("00-ff r-xp 00 00:00 1 /lib/libc.so.6\n")
    monkeypatch.setattr(library, "MAPS", tmp_path / "maps")
    assert "OpenMP" in str(library.open_library(tmp_path))


@compiled
def test_a_library_of_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    assert "another version" in str(library.open_library(Path(library.__file__).parent))


@pytest.mark.parametrize("size", [0, 5, 3 << 20])
def test_large_pages_are_ordinary_memory(size: int) -> None:
    memory = library.empty_huge((size,), torch.bfloat16)
    assert torch.equal(memory.fill_(3), torch.full((size,), 3, dtype=torch.bfloat16))
