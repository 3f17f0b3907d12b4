"""Checkpoints that were saved quantised give the weights they stand for, whole and in slices."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import load_weights
from model.config import load_config
from model.errors import CheckpointError, ConfigError
from model.quantized_linear import QuantizedLinear
from model.shard import Shard
from tests.checkpoints import CPU, flattened, load
from tests.quantized_checkpoints import (
    BITSANDBYTES,
    SIZES,
    compressed,
    float8,
    is_projection,
    nf4,
    pack_int4,
    rewrite,
    scheme,
)
from tests.tiny import write_checkpoint

FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "int4 in groups": (
        partial(pack_int4, group=32),
        compressed("pack-quantized", scheme(num_bits=4, type="int", strategy="group", group_size=32)),
    ),
    "int4 by row": (
        partial(pack_int4, group=None),
        compressed("pack-quantized", scheme(num_bits=4, strategy="channel")),
    ),
    "fp8 by row": (
        partial(float8, one_scale=False),
        compressed("float-quantized", scheme(num_bits=8, type="float", strategy="channel")),
    ),
    "fp8 with one scale": (
        partial(float8, one_scale=True),
        compressed("naive-quantized", scheme(num_bits=8, type="float", strategy="tensor")),
    ),
    "nf4": (partial(nf4, nested=False), BITSANDBYTES),
    "nf4 with quantised scales": (partial(nf4, nested=True), BITSANDBYTES | {"bnb_4bit_use_double_quant": True}),
}
NF4 = FORMATS["nf4 with quantised scales"]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=FORMATS.values(), ids=FORMATS.keys())
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantised checkpoint, and a plain one of what it stands for."""
    directory = tmp_path_factory.mktemp("saved")
    quantize, config = request.param
    meant = rewrite(directory / "quantised", quantize, config)
    write_checkpoint(directory / "plain", **SIZES)
    save_file(meant, directory / "plain" / "model.safetensors")
    return directory / "quantised", directory / "plain"


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one with the most that can be damaged."""
    directory = tmp_path_factory.mktemp("nested")
    rewrite(directory, *NF4)
    return directory


@pytest.mark.parametrize(
    "shard",
    [
        Shard(),
        Shard(1, 2, ((2, 0), (1, 3)), expert_slice=0, expert_slices=2),
        Shard(3, 4, ((1,), (2,)), expert_slice=3, expert_slices=4),
    ],
)
def test_every_format_gives_what_it_stands_for(saved: tuple[Path, Path], shard: Shard) -> None:
    quantised, plain = saved
    found = load(quantised, shard)
    assert all(isinstance(block.qkv, QuantizedLinear) for block in found.blocks)
    for a, b in zip(flattened(found), flattened(load(plain, shard)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_matrices_that_were_left_plain_stay_plain(tmp_path: Path) -> None:
    """Also where the parts of one projection differ: then all of it is."""
    quantize, config = FORMATS["int4 in groups"]
    meant = rewrite(tmp_path, quantize, config, lambda name: is_projection(name) and "v_proj" not in name)
    block = load(tmp_path).blocks[1]
    assert not isinstance(block.qkv, QuantizedLinear)
    assert isinstance(block.output, QuantizedLinear)
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    torch.testing.assert_close(block.qkv.weight_OI, torch.cat([meant[name] for name in names]), rtol=1e-6, atol=1e-7)


def test_a_quantised_router_and_head_are_read(tmp_path: Path) -> None:
    """bitsandbytes takes every linear map that it is not told to skip."""
    meant = rewrite(tmp_path, *NF4, lambda name: is_projection(name) or "gate" in name or "lm_head" in name)
    found = load(tmp_path)
    router = meant["model.layers.1.block_sparse_moe.gate.weight"]
    torch.testing.assert_close(found.blocks[1].router_ED, router, rtol=1e-6, atol=1e-7)
    assert found.head is not None
    torch.testing.assert_close(found.head.weight_OI, meant["lm_head.weight"], rtol=1e-6, atol=1e-7)


def test_a_rank_is_told_of_the_bytes_it_reads(saved: tuple[Path, Path]) -> None:
    quantised, _ = saved
    heard: list[tuple[int, int]] = []
    load_weights(
        quantised,
        load_config(quantised),
        Shard(),
        dtype=torch.float32,
        device=CPU,
        progress=lambda *told: heard.append(told),
    )
    stored = load_file(quantised / "model.safetensors")
    size = sum(x.nbytes for name, x in stored.items() if not name.endswith("_shape"))  # known from the config
    assert heard[-1] == (size, size)


def changed(source: Path, directory: Path, name: str, tensor: Tensor | None) -> Path:
    """A copy with another tensor of that name, or none."""
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    shutil.copy(source / "config.json", directory)
    save_file(tensors if tensor is None else tensors | {name: tensor}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{QUERY}.absmax", None, r"q_proj\.weight\.absmax is missing"),
        (f"{QUERY}.absmax", torch.zeros(512), r"absmax is F32; served are U8"),
        (QUERY, torch.zeros(256, 64, dtype=torch.uint8), r"q_proj\.weight has shape \(256, 64\)"),
        (f"{QUERY}.quant_map", torch.zeros(16), r"quant_map holds other levels than nf4's"),
        (f"{QUERY}.quant_state.bitsandbytes__nf4", torch.zeros(9999, dtype=torch.uint8), "not 1 to 4096 numbers"),
        (f"{QUERY}.quant_state.bitsandbytes__nf4", torch.zeros(0, dtype=torch.uint8), "not 1 to 4096 numbers"),
        (f"{QUERY}.quant_state.bitsandbytes__nf4", torch.tensor(9, dtype=torch.uint8), "not 1 to 4096 numbers"),
        (f"{QUERY}.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "is not a JSON object"),
    ],
)
def test_damage_is_named(nested: Path, tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(changed(nested, tmp_path, name, tensor))


@pytest.mark.parametrize(
    ("field", "value"),
    [("blocksize", 128), ("shape", [64, 512]), ("quant_type", "fp4"), ("nested_blocksize", 64), ("nested_offset", "1")],
)
def test_a_matrix_that_says_otherwise_of_itself_is_refused(
    nested: Path, tmp_path: Path, field: str, value: object
) -> None:
    name = f"{QUERY}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(load_file(nested / "model.safetensors")[name].tolist()))
    text = json.dumps(state | {field: value}).encode()
    with pytest.raises(CheckpointError, match=rf"q_proj\.weight has {field} "):
        load(changed(nested, tmp_path, name, torch.tensor(list(text), dtype=torch.uint8)))


def test_scales_that_are_no_numbers_are_found_when_asked(tmp_path: Path) -> None:
    source, damaged = tmp_path / "source", tmp_path / "damaged"
    rewrite(source, *FORMATS["int4 in groups"])
    damaged.mkdir()
    scale = load_file(source / "model.safetensors")[f"{QUERY}_scale"]
    scale[3, 1] = torch.nan
    load(changed(source, damaged, f"{QUERY}_scale", scale))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_packed, or what belongs to it, holds NaN or infinity"):
        load_weights(damaged, load_config(damaged), Shard(), dtype=torch.float32, device=CPU, check_finite=True)


def test_it_cannot_become_another_mode(nested: Path) -> None:
    config = load_config(nested)
    with pytest.raises(ConfigError, match="the checkpoint is nf4 already and cannot become int8"):
        load_weights(nested, config, Shard(), dtype=torch.float32, device=CPU, quantization="int8")
    load_weights(nested, config, Shard(), dtype=torch.float32, device=CPU, quantization="nf4")
