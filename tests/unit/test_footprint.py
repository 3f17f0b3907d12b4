"""What a rank is said to hold is what it holds: against the tensors of a loaded checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.config import ParallelConfig
from cluster.footprint import COMMUNICATOR_BYTES, Footprint, footprint, matrix_bytes
from cluster.placement import even_placement
from model.checkpoint import load_weights
from model.config import MixtralConfig, load_config
from model.kv_cache import KVCache
from model.modes import Mode
from model.shard import Shard
from model.weights import MixtralWeights
from tests.kernel_cubins import SIZES_8X7B
from tests.tiny import write_checkpoint


def bytes_in(weights: MixtralWeights) -> dict[str, int]:
    def size(*tensors: torch.Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert weights.head is not None
    return {
        "attention": sum(size(block.qkv.weight_OI, block.output.weight_OI) for block in weights.blocks),
        "experts": sum(
            size(expert.gate_up.weight_OI, expert.down.weight_OI)
            for block in weights.blocks
            for expert in block.experts
        ),
        "embedding": size(weights.embedding_VD),
        "head": size(weights.head.weight_OI),
        "other": size(weights.norm_D)
        + sum(size(block.attention_norm_D, block.moe_norm_D, block.router_ED) for block in weights.blocks),
    }


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_what_rank_0_loads(tmp_path: Path, tensor: int, tied: bool) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=tied, num_local_experts=3, vocab_size=385)
    model = load_config(tmp_path)
    parallel = ParallelConfig(tensor=tensor)
    holds = footprint(
        model, parallel, itemsize=4, matrix_bytes=lambda height, width: 4 * height * width,
        max_step_tokens=64, max_running=4,
    )  # fmt: skip
    placement = even_placement(model.num_hidden_layers, model.num_local_experts, tensor)
    shard = Shard(0, tensor, placement.slots_of(0))
    weights = load_weights(tmp_path, model, shard, dtype=torch.float32, device=torch.device("cpu"))
    found = bytes_in(weights)
    assert {part: getattr(holds, part) for part in found} == found
    assert holds.weights == sum(found.values())
    assert holds.kv_per_token == KVCache.bytes_per_page(model, shard, 1, torch.float32)


def held(parallel: ParallelConfig, max_running: int = 256) -> Footprint:
    return footprint(
        MixtralConfig.from_dict({}, "8x7B"), parallel, itemsize=2,
        matrix_bytes=lambda height, width: 2 * height * width, max_step_tokens=2048, max_running=max_running,
    )  # fmt: skip


def test_graphs_are_planned_where_there_are_any() -> None:
    alone = held(ParallelConfig())
    assert held(ParallelConfig(), max_running=8).graphs < alone.graphs < 1 << 30
    assert held(ParallelConfig(tensor=2, exchange="all_to_all")).graphs == 0, "which cannot be captured"
    assert held(ParallelConfig(tensor=4)).graphs < alone.graphs, "each has fewer heads"
    assert held(ParallelConfig(data=4)).graphs > alone.graphs, "every group is padded to as many rows"
    assert alone.beside == alone.workspace + alone.graphs


@pytest.mark.parametrize(("tensor", "data", "groups"), [(1, 1, 0), (2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_every_group_of_other_ranks_has_buffers(tensor: int, data: int, groups: int) -> None:
    assert held(ParallelConfig(tensor=tensor, data=data)).communicators == groups * COMMUNICATOR_BYTES


@pytest.mark.parametrize(("mode", "gigabytes"), [(None, 94), ("fp8", 48), ("int4", 27), ("nf4", 27)])
def test_what_mixtral_8x7b_takes(mode: Mode | None, gigabytes: int) -> None:
    """In four bits it fits a card of 40 GB with a third of it left for pages."""
    model = MixtralConfig.from_dict(SIZES_8X7B, "config.json")
    holds = footprint(
        model, ParallelConfig(), itemsize=2, matrix_bytes=matrix_bytes(mode, 2), max_step_tokens=2048, max_running=256
    )
    assert gigabytes - 2 < holds.weights / 1e9 < gigabytes
