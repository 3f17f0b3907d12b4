"""From files to one rank's weights. Only what the rank holds is read; how files spell it stays in here.

D: model width.  V: vocabulary rows.  C: head_dim.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.comm import split_rows
from model.config import MixtralConfig
from model.errors import CheckpointError
from model.layers import Linear
from model.shard import Shard
from model.weights import BlockWeights, ExpertWeights, MixtralWeights

Progress = Callable[[int, int], None]


def load_weights(
    directory: Path,
    config: MixtralConfig,
    shard: Shard,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> MixtralWeights:
    reader = Reader(directory, dtype, device)
    C = config.head_dim
    queries, kv_heads = config.head_slices(shard)
    q, kv = scaled(queries, C), scaled(kv_heads, C)
    blocks = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        attention, moe = prefix + "self_attn.", prefix + "block_sparse_moe."
        qkv = [reader.read(f"{attention}{x}_proj.weight", rows=r) for x, r in (("q", q), ("k", kv), ("v", kv))]
        blocks.append(
            BlockWeights(
                reader.read(prefix + "input_layernorm.weight"),
                Linear(torch.cat(qkv)),
                Linear(reader.read(attention + "o_proj.weight", columns=q)),
                reader.read(prefix + "post_attention_layernorm.weight"),
                reader.read(moe + "gate.weight"),
                tuple(
                    ExpertWeights(
                        *(Linear(reader.read(f"{moe}experts.{expert}.{w}.weight")) for w in ("w1", "w3", "w2"))
                    )
                    for expert in shard.experts(layer, config.num_local_experts)
                ),
            )
        )
        if progress is not None:
            progress(reader.bytes_read, reader.bytes_read)
    vocabulary = split_rows(config.vocab_size, shard.tensor_size)
    first = sum(vocabulary[: shard.tensor_rank])
    rows = range(first, first + vocabulary[shard.tensor_rank])
    embedding = reader.read("model.embed_tokens.weight", rows=rows)
    head = embedding if config.tie_word_embeddings else reader.read("lm_head.weight", rows=rows)
    return MixtralWeights(first, embedding, tuple(blocks), reader.read("model.norm.weight"), Linear(head))


def scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


class Reader:
    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.bytes_read = 0
        index = directory / "model.safetensors.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        self._handles: dict[str, Any] = {}
        for name in sorted(names):
            handle: Any = safe_open(directory / name, framework="pt")
            self._handles.update(dict.fromkeys(list(handle.keys()), handle))

    def read(self, name: str, *, rows: range | None = None, columns: range | None = None) -> Tensor:
        if name not in self._handles:
            raise CheckpointError(f"{name} is missing")
        part = self._handles[name].get_slice(name)
        if columns is not None:
            tensor = part[:, columns.start : columns.stop]
        elif rows is not None:
            tensor = part[rows.start : rows.stop]
        else:
            tensor = part[:]
        self.bytes_read += tensor.nbytes
        assert isinstance(tensor, Tensor)
        return tensor.to(device=self._device, dtype=self._dtype)
