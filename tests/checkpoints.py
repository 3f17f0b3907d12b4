"""Tiny checkpoints in every dialect, and what loading them gave, laid out to be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import load_weights
from model.config import load_config
from model.shard import Shard
from model.weights import MixtralWeights
from tests.tiny import CONFIG, weights

CPU = torch.device("cpu")
QUERY = "model.layers.1.self_attn.q_proj.weight"


def load(directory: Path, shard: Shard = Shard(), dtype: torch.dtype = torch.float32) -> MixtralWeights:  # noqa: B008
    return load_weights(directory, load_config(directory), shard, dtype=dtype, device=CPU)


def head_of(weights: MixtralWeights) -> Tensor:
    assert weights.head is not None
    return weights.head.weight_OI


def flattened(weights: MixtralWeights) -> list[Tensor]:
    tensors = [weights.embedding_VD, weights.norm_D, head_of(weights)]
    for block in weights.blocks:
        tensors += [block.attention_norm_D, block.qkv.weight_OI, block.output.weight_OI, block.moe_norm_D]
        tensors.append(block.router_ED)
        for expert in block.experts:
            tensors += [expert.gate_up.weight_OI, expert.down.weight_OI]
    return tensors


def assert_same(found: MixtralWeights, expected: MixtralWeights) -> None:
    for a, b in zip(flattened(found), flattened(expected), strict=True):
        assert torch.equal(a, b)


def pairs_from_halves(matrix: Tensor, heads: int) -> Tensor:
    head_dim, width = matrix.shape[0] // heads, matrix.shape[1]
    return matrix.view(heads, 2, head_dim // 2, width).transpose(1, 2).reshape(matrix.shape).contiguous()


# Each of these takes tensors under Hugging Face's names, one for each expert, and spells them in another dialect.


def mistral(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        if ".q_proj" in name:
            tensor = pairs_from_halves(tensor, CONFIG["num_attention_heads"])
        if ".k_proj" in name:
            tensor = pairs_from_halves(tensor, CONFIG["num_key_value_heads"])
        for old, new in (
            ("model.embed_tokens", "tok_embeddings"),
            ("model.", ""),
            ("lm_head", "output"),
            ("self_attn", "attention"),
            ("q_proj", "wq"),
            ("k_proj", "wk"),
            ("v_proj", "wv"),
            ("o_proj", "wo"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("block_sparse_moe", "feed_forward"),
        ):
            name = name.replace(old, new)
        out[name] = tensor
    return out


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {name.replace("feed_forward", "block_sparse_moe"): x for name, x in mistral(tensors).items()}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"layers.{layer}.block_sparse_moe."
        for w in ("w1", "w2", "w3"):
            names = [f"{prefix}experts.{e}.{w}.weight" for e in range(CONFIG["num_local_experts"])]
            parts = [out.pop(name) for name in names]
            out[prefix + w] = torch.cat([part.T if w == "w2" else part for part in parts]).contiguous()
    return out


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = dict(tensors)
    for layer in range(CONFIG["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        out[new + "gate.weight"] = out.pop(old + "gate.weight")
        experts = [
            [out.pop(f"{old}experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")]
            for e in range(CONFIG["num_local_experts"])
        ]
        out[new + "experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
        out[new + "experts.down_proj"] = torch.stack([down for _, _, down in experts])
    return out


def write_params(directory: Path) -> None:
    names = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "hidden_dim": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
        "vocab_size": "vocab_size",
        "rope_theta": "rope_theta",
    }
    params = {theirs: CONFIG[ours] for theirs, ours in names.items()}
    moe = {"num_experts": CONFIG["num_local_experts"], "num_experts_per_tok": CONFIG["num_experts_per_tok"]}
    (directory / "params.json").write_text(json.dumps(params | {"head_dim": 16, "moe": moe}))


def write_index(directory: Path, parts: int) -> Path:
    """Split model.safetensors as large models come."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in range(parts):
        name = f"model-{number + 1:05}-of-{parts:05}.safetensors"
        part = dict(list(tensors.items())[number::parts])
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def changed(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = weights(CONFIG)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory
