"""Tiny checkpoints whose matrices are quantised, written by the definition of each format, not by our own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.quantization import NF4_LEVELS
from tests.tiny import write_checkpoint

# Widths that groups of 64 and slices of them divide.
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_key_value_heads": 4}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")


def is_projection(name: str) -> bool:
    return any(f".{part}.weight" in name for part in PROJECTIONS)


def rewrite(directory: Path, quantize: Any, config: dict[str, Any], which: Any = is_projection) -> dict[str, Tensor]:
    """A checkpoint with matrices replaced by what quantize(name, matrix) gives; what they stand for comes back.

    quantize gives the tensors that go into the file, and the matrix they stand for.
    """
    write_checkpoint(directory, **SIZES, quantization_config=config)
    plain = load_file(directory / "model.safetensors")
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if which(name):
            tensors, meant[name] = quantize(name, tensor)
            stored |= tensors
        else:
            stored[name] = meant[name] = tensor
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return meant


def scheme(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}


def compressed(layout: str, group: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    return fields | {"ignore": ["lm_head"], "config_groups": {"group_0": group}} | more


def pack_int4(name: str, weight: Tensor, group: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors, pack-quantized: eight codes plus 8 in a word, the first lowest."""
    height, width = weight.shape
    groups = weight.view(height, -1, group or width)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).half()
    codes = (groups / scale).round().clamp(-8, 7)
    meant = (codes * scale.float()).view(height, width)
    words = torch.zeros(height, width // 8, dtype=torch.int64)
    for place in range(8):
        words |= (codes.view(height, width)[:, place::8].long() + 8) << (4 * place)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    tensors = {"packed": words, "scale": scale.squeeze(-1), "shape": torch.tensor([height, width])}
    return {f"{name}_{part}": tensor.contiguous() for part, tensor in tensors.items()}, meant


def float8(name: str, weight: Tensor, one_scale: bool) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors, float-quantized."""
    scale = (weight.abs().amax() if one_scale else weight.abs().amax(1, keepdim=True)) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {name: codes, f"{name}_scale": scale.reshape(1) if one_scale else scale}
    return tensors, codes.float() * scale


def nf4(name: str, weight: Tensor, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """bitsandbytes, 4 bits: the first of two codes in the high half; scales to bytes where they are quantised too."""
    levels = torch.tensor(NF4_LEVELS)
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None])[..., None] - levels).abs().argmin(-1).to(torch.uint8).flatten()
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    tensors = {name: (codes[::2] << 4 | codes[1::2])[:, None], f"{name}.quant_map": levels}
    if nested:
        offset = float(absmax.mean())
        of_bytes = torch.linspace(-1, 1, 256)
        padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        outer = padded.abs().amax(1)
        inner = ((padded / outer[:, None])[..., None] - of_bytes).abs().argmin(-1).to(torch.uint8)
        absmax = (of_bytes[inner.long()] * outer[:, None]).flatten()[: len(absmax)] + offset
        tensors |= {f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": of_bytes}
        tensors[f"{name}.absmax"] = inner.flatten()[: len(absmax)].contiguous()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors[f"{name}.absmax"] = absmax
    text = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors, (levels[codes.long()].view(-1, 64) * absmax[:, None]).view(weight.shape)


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
