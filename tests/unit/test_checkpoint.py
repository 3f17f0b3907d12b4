"""A rank holds its share of the weights, and reads no more than that; what is wrong in it is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import load_weights
from model.config import MixtralConfig, load_config
from model.errors import CheckpointError, ConfigError
from model.moe import run_experts
from model.shard import Shard
from tests.checkpoints import (
    CPU,
    QUERY,
    assert_same,
    changed,
    flattened,
    fused,
    head_of,
    load,
    mistral,
    stacked,
    write_params,
)
from tests.tiny import CONFIG, weights, write_checkpoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_once_to_the_wanted_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write_checkpoint(tmp_path)
    wide, narrow = load(directory), load(directory, dtype=dtype)
    for a, b in zip(flattened(wide), flattened(narrow), strict=True):
        assert torch.equal(a.to(dtype), b)


@pytest.mark.parametrize("rewrite", [dict, fused, mistral, stacked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_are_read_at_once_make_no_difference(
    tmp_path: Path,
    dtype: torch.dtype,
    rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rewrite in (mistral, stacked):
        write_params(tmp_path)
        save_file(rewrite(weights(CONFIG)), tmp_path / "consolidated.safetensors")
    else:
        save_file(rewrite(weights(CONFIG)), write_checkpoint(tmp_path) / "model.safetensors")
    expected = load(tmp_path, Shard(1, 2), dtype)
    monkeypatch.setattr("model.checkpoint.CPU_BLOCK", 700)
    assert_same(load(tmp_path, Shard(1, 2), dtype), expected)


@pytest.mark.parametrize(("size", "kv_heads", "vocab"), [(2, 2, 384), (2, 1, 385), (4, 2, 387), (4, 4, 384)])
def test_slices_of_all_ranks_make_up_the_whole(tmp_path: Path, size: int, kv_heads: int, vocab: int) -> None:
    directory = write_checkpoint(tmp_path, num_key_value_heads=kv_heads, vocab_size=vocab)
    whole = load(directory)
    slots = ((0, 2), (3,))
    ranks = [load(directory, Shard(rank, size, slots)) for rank in range(size)]
    C, H = 16, 4
    G = max(1, kv_heads // size)
    for layer, block in enumerate(whole.blocks):
        q, k, v = block.qkv.weight_OI.split([H * C, kv_heads * C, kv_heads * C])
        for rank, held in enumerate(ranks):
            local_q, local_k, local_v = held.blocks[layer].qkv.weight_OI.split([H // size * C, G * C, G * C])
            assert torch.equal(local_q, q.chunk(size)[rank])
            first = rank * H // size // (H // kv_heads) * C
            assert torch.equal(local_k, k[first : first + G * C])
            assert torch.equal(local_v, v[first : first + G * C])
            for slot, expert in enumerate(slots[layer]):
                found, expected = held.blocks[layer].experts[slot], block.experts[expert]
                assert torch.equal(found.down.weight_OI, expected.down.weight_OI)
        columns = [held.blocks[layer].output.weight_OI for held in ranks]
        assert torch.equal(torch.cat(columns, dim=1), block.output.weight_OI)
    assert torch.equal(torch.cat([held.embedding_VD for held in ranks]), whole.embedding_VD)
    assert torch.equal(torch.cat([head_of(held) for held in ranks]), head_of(whole))
    assert [held.first_token for held in ranks] == [sum(len(r.embedding_VD) for r in ranks[:i]) for i in range(size)]


@pytest.mark.parametrize("rewrite", [dict, fused])
def test_a_rank_reads_its_share_and_no_more(
    tmp_path: Path, rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path)
    save_file(rewrite(weights(CONFIG)), directory / "model.safetensors")
    total = sum(x.nbytes for x in weights(CONFIG).values())
    half, all_experts = ((0, 1), (0, 1)), ((0, 1, 2, 3), (0, 1, 2, 3))
    shards = [Shard(0, 2, half), Shard(1, 2, ((2, 3), (2, 3)))]
    shards += [Shard(rank, 2, all_experts, expert_slice=rank, expert_slices=2) for rank in range(2)]
    requested = 0
    pread = os.preadv

    def counting(descriptor: int, buffers: list[Any], offset: int) -> int:
        nonlocal requested
        requested += sum(len(buffer) for buffer in buffers)
        return int(pread(descriptor, buffers, offset))

    monkeypatch.setattr("model.tensor_files.os.preadv", counting)
    heard: list[tuple[int, int]] = []
    for shard in shards:
        requested = 0
        heard.clear()
        load_weights(
            directory,
            load_config(directory),
            shard,
            dtype=torch.float32,
            device=CPU,
            progress=lambda *told: heard.append(told),
        )
        # Norms and routers lie on every rank; in this tiny model they are 1.2 % of the whole.
        copies = sum(x.nbytes for name, x in weights(CONFIG).items() if "norm" in name or "moe.gate" in name)
        assert requested == pytest.approx(total / 2, rel=0.01 + copies / total)
        assert heard[-1] == (requested, requested)
        assert [done for done, _ in heard] == sorted(done for done, _ in heard)


@pytest.mark.parametrize("rewrite", [dict, fused, mistral, stacked])
@pytest.mark.parametrize("slices", [2, 5])
def test_slices_of_an_expert_add_up_to_it(
    tmp_path: Path, rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]], slices: int
) -> None:
    """F is 96: five slices are uneven."""
    if rewrite in (mistral, stacked):
        write_params(tmp_path)
        save_file(rewrite(weights(CONFIG)), tmp_path / "consolidated.safetensors")
    else:
        save_file(rewrite(weights(CONFIG)), write_checkpoint(tmp_path) / "model.safetensors")
    slots = ((0, 3), (2, 1))
    whole = load(tmp_path, Shard(slots=slots))
    parts = [load(tmp_path, Shard(slots=slots, expert_slice=part, expert_slices=slices)) for part in range(slices)]
    x_ND = torch.randn(10, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(slices))
    for layer, block in enumerate(whole.blocks):
        for slot, expert in enumerate(block.experts):
            held = [part.blocks[layer].experts[slot] for part in parts]
            gates, ups = zip(*(part.gate_up.weight_OI.chunk(2) for part in held), strict=True)
            assert torch.equal(torch.cat((*gates, *ups)), expert.gate_up.weight_OI)
            assert torch.equal(torch.cat([part.down.weight_OI for part in held], dim=1), expert.down.weight_OI)
        expected = run_experts(x_ND, (4, 6), block.experts)
        found = sum(run_experts(x_ND, (4, 6), part.blocks[layer].experts) for part in parts)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(3, 4, 2), (4, 12, 6), (8, 4, 2)])
def test_an_impossible_slicing_is_refused_before_any_file_is_opened(size: int, heads: int, kv_heads: int) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    config = MixtralConfig.from_dict(CONFIG | sizes, "config.json")
    with pytest.raises(ConfigError, match=f"tensor parallel {size} does not fit {heads} query and {kv_heads}"):
        load_weights(Path("/nowhere"), config, Shard(0, size), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("rewrite", [dict, fused])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_named_when_asked(
    tmp_path: Path, value: float, rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    directory = write_checkpoint(tmp_path)
    tensors = rewrite(weights(CONFIG))
    name = next(name for name in tensors if "layers.1" in name and ("experts.3.w2" in name or "down_proj" in name))
    tensors[name][-1, -1] = value
    save_file(tensors, directory / "model.safetensors")
    load(directory)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} holds NaN or infinity$"):
        load_weights(directory, load_config(directory), Shard(), dtype=torch.float32, device=CPU, check_finite=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_weights_pass(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write_checkpoint(tmp_path)
    found = load_weights(directory, load_config(directory), Shard(), dtype=dtype, device=CPU, check_finite=True)
    assert_same(found, load(directory, dtype=dtype))


def test_weights_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    directory = changed(write_checkpoint(tmp_path), lambda t: t[QUERY].fill_(1e5))
    with pytest.raises(CheckpointError, match=r"q_proj.weight holds NaN or infinity, as saved or once cast to .*16"):
        load_weights(directory, load_config(directory), Shard(), dtype=torch.float16, device=CPU, check_finite=True)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    for number in range(2):
        save_file(mistral(weights(CONFIG)), directory / f"consolidated.0{number}.safetensors")
    with pytest.raises(CheckpointError, match="is in another file too"):
        load(tmp_path)
