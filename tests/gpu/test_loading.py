"""What is read through pinned memory onto the device is what a CPU reads, plain, quantised on the way, or saved so."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers

from model.checkpoint import load_weights
from model.config import load_config
from model.modes import Mode
from model.quantized_writer import quantize_checkpoint
from model.shard import Shard
from model.weights import MixtralWeights

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 4,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def load(directory: Path, device: torch.device, mode: Mode | None) -> list[torch.Tensor]:
    """Columns of attention's output among it, rows of everything else."""
    config = load_config(directory)
    weights = load_weights(
        directory, config, Shard(1, 2), dtype=torch.bfloat16, device=device, quantization=mode, check_finite=True
    )
    return [tensor.cpu() for tensor in flattened(weights)]


def flattened(weights: MixtralWeights) -> list[torch.Tensor]:
    assert weights.head is not None
    tensors = [weights.embedding_VD, weights.norm_D, weights.head.weight_OI]
    for block in weights.blocks:
        tensors += [block.qkv.weight_OI, block.output.weight_OI, block.router_ED]
        tensors += [linear.weight_OI for expert in block.experts for linear in (expert.gate_up, expert.down)]
    return tensors


@pytest.mark.parametrize("block", [1 << 22, 5000])
@pytest.mark.parametrize("mode", [None, *get_args(Mode)])
def test_a_device_holds_what_a_cpu_holds(
    device: torch.device,
    checkpoint: Path,
    mode: Mode | None,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.checkpoint.BLOCK", block)
    expected = load(checkpoint, torch.device("cpu"), mode)
    found = load(checkpoint, device, mode)
    assert all(map(torch.equal, found, expected))
    if mode is not None:
        quantize_checkpoint(checkpoint, tmp_path / "saved", mode)
        assert all(map(torch.equal, load(tmp_path / "saved", device, None), expected))
