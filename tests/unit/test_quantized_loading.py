"""Weights quantised while they are read are the same in every layout, and from every dialect."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import load_experts, load_weights
from model.config import load_config
from model.errors import CheckpointError, ConfigError
from model.modes import Mode
from model.quantization import quantize
from model.quantized_linear import QuantizedLinear
from model.quantized_writer import quantize_checkpoint
from model.shard import Shard
from model.weights import MixtralWeights
from tests.checkpoints import CPU, assert_same, fused, mistral, stacked, write_params
from tests.quantized_checkpoints import SIZES
from tests.tiny import CONFIG, weights, write_checkpoint

MODES: tuple[Mode, ...] = ("int8", "int4", "nf4", "fp8")
# One process asks for tensor parallel ranks and for slices of experts apart: these have each once.
LAYOUTS = list(product((1, 2, 4), (1, 2))) if os.environ.get("MIXTRAL_TEST_ALL") else [(2, 1), (4, 2)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint, which nobody changes."""
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **SIZES)


def load(directory: Path, mode: Mode | None, **shard: Any) -> MixtralWeights:
    config = load_config(directory)
    return load_weights(directory, config, Shard(**shard), dtype=torch.float32, device=CPU, quantization=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tensor", "slices"), LAYOUTS)
def test_quantise_then_slice_is_a_slice_of_the_whole(directory: Path, mode: Mode, tensor: int, slices: int) -> None:
    whole = load(directory, mode)
    ranks = [load(directory, mode, tensor_rank=rank, tensor_size=tensor) for rank in range(tensor)]
    parts = [load(directory, mode, expert_slice=part, expert_slices=slices) for part in range(slices)]
    for layer, block in enumerate(whole.blocks):
        held = [rank.blocks[layer] for rank in ranks]
        q, k, v = (torch.cat(x) for x in zip(*(each.qkv.weight_OI.chunk(3) for each in held), strict=True))
        assert torch.equal(torch.cat((q, k, v)), block.qkv.weight_OI)
        assert torch.equal(torch.cat([each.output.weight_OI for each in held], dim=1), block.output.weight_OI)
        for slot, expert in enumerate(block.experts):
            cut = [part.blocks[layer].experts[slot] for part in parts]
            gates, ups = zip(*(each.gate_up.weight_OI.chunk(2) for each in cut), strict=True)
            assert torch.equal(torch.cat((*gates, *ups)), expert.gate_up.weight_OI)
            assert torch.equal(torch.cat([each.down.weight_OI for each in cut], dim=1), expert.down.weight_OI)
        assert torch.equal(held[-1].router_ED, block.router_ED)


@pytest.mark.parametrize("mode", MODES)
def test_projections_are_quantised_and_nothing_else(directory: Path, mode: Mode) -> None:
    plain, found = load(directory, None), load(directory, mode)
    saved = load_file(directory / "model.safetensors")
    for layer, block in enumerate(found.blocks):
        linears = [block.qkv, block.output, *(x for expert in block.experts for x in (expert.gate_up, expert.down))]
        assert all(isinstance(linear, QuantizedLinear) for linear in linears)
        down = saved[f"model.layers.{layer}.block_sparse_moe.experts.2.w2.weight"]
        assert torch.equal(block.experts[2].down.weight_OI, quantize(down, mode).dequantize(torch.float32))
        assert torch.equal(block.router_ED, plain.blocks[layer].router_ED)
        assert torch.equal(block.moe_norm_D, plain.blocks[layer].moe_norm_D)
    assert found.head is not None
    assert plain.head is not None
    assert torch.equal(found.head.weight_OI, plain.head.weight_OI)
    assert torch.equal(found.embedding_VD, plain.embedding_VD)


@pytest.mark.parametrize("mode", ["int8", "fp8"])
@pytest.mark.parametrize("rewrite", [fused, mistral, stacked])
def test_every_dialect_gives_the_same(
    tmp_path: Path, mode: Mode, rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    expected = load(write_checkpoint(tmp_path / "hf"), mode)
    directory = tmp_path / "other"
    if rewrite is fused:
        write_checkpoint(directory)
        save_file(rewrite(weights(CONFIG)), directory / "model.safetensors")
    else:
        directory.mkdir()
        write_params(directory)
        save_file(rewrite(weights(CONFIG)), directory / "consolidated.safetensors")
    assert_same(load(directory, mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_are_read_at_once_make_no_difference(
    directory: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(directory, tmp_path / "saved", mode)
    expected = load(directory, mode, tensor_rank=1, tensor_size=2)
    monkeypatch.setattr("model.checkpoint.CPU_BLOCK", 7000)  # whole rows, and some are left for the last block
    assert_same(load(directory, mode, tensor_rank=1, tensor_size=2), expected)
    assert_same(load(tmp_path / "saved", None, tensor_rank=1, tensor_size=2), expected)


@pytest.mark.parametrize("mode", MODES)
def test_codes_do_not_depend_on_the_models_precision(directory: Path, mode: Mode) -> None:
    wide = load(directory, mode)
    narrow = load_weights(
        directory, load_config(directory), Shard(), dtype=torch.bfloat16, device=CPU, quantization=mode
    )
    for a, b in zip(wide.blocks, narrow.blocks, strict=True):
        assert torch.equal(a.output.weight_OI.bfloat16(), b.output.weight_OI)
        assert torch.equal(a.experts[1].gate_up.weight_OI.bfloat16(), b.experts[1].gate_up.weight_OI)


@pytest.mark.parametrize("mode", MODES)
def test_an_expert_read_alone_is_the_same(directory: Path, mode: Mode) -> None:
    shard = Shard(expert_slice=1, expert_slices=2)
    whole = load(directory, mode, expert_slice=1, expert_slices=2)
    [(key, expert)] = load_experts(
        directory, load_config(directory), shard, [(1, 3)], dtype=torch.float32, device=CPU, quantization=mode
    ).items()
    assert key == (1, 3)
    assert torch.equal(expert.down.weight_OI, whole.blocks[1].experts[3].down.weight_OI)
    assert torch.equal(expert.gate_up.weight_OI, whole.blocks[1].experts[3].gate_up.weight_OI)


@pytest.mark.parametrize(
    ("sizes", "shard", "message"),
    [
        ({"hidden_size": 96}, Shard(), "hidden_size 96 is no multiple: use int8 or fp8"),
        ({"head_dim": 32}, Shard(0, 4), "tensor parallel 4 leaves 32 of attention's output projection on each rank"),
        ({}, Shard(expert_slice=0, expert_slices=3), "256 in 3 slices leaves 86 of an expert on a rank"),
        ({"intermediate_size": 96}, Shard(), "intermediate_size 96 in 1 slices leaves 96 of an expert"),
    ],
)
def test_slices_that_would_cut_a_group_are_refused_before_a_file_is_opened(
    tmp_path: Path, sizes: dict[str, int], shard: Shard, message: str
) -> None:
    directory = write_checkpoint(tmp_path, **SIZES | sizes)
    (directory / "model.safetensors").unlink()
    for mode in ("int4", "nf4"):
        with pytest.raises(ConfigError, match=f"^{mode} keeps 64 columns of a matrix together, and .*{message}"):
            load_weights(directory, load_config(directory), shard, dtype=torch.float32, device=CPU, quantization=mode)


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_a_scale_for_each_row_allows_every_slice(tmp_path: Path, mode: Mode) -> None:
    directory = write_checkpoint(tmp_path, **SIZES | {"intermediate_size": 97})
    whole = load(directory, mode).blocks[0].experts[0].down.weight_OI
    parts = [load(directory, mode, expert_slice=part, expert_slices=3).blocks[0].experts[0] for part in range(3)]
    assert torch.equal(torch.cat([part.down.weight_OI for part in parts], dim=1), whole)


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_no_numbers_are_named_when_asked(tmp_path: Path, mode: Mode) -> None:
    directory = write_checkpoint(tmp_path, **SIZES)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][5, 7] = torch.inf
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2\.weight holds NaN or infinity$"):
        load_weights(
            directory,
            load_config(directory),
            Shard(),
            dtype=torch.bfloat16,
            device=CPU,
            quantization=mode,
            check_finite=True,
        )
