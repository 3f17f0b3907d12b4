"""Mixtral weights of any size, random, made where they are to lie: no file is read and nothing is moved.

Experts of one block lie together in memory, as the GPU's kernels want them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import MixtralConfig
from model.layers import Linear, PlainLinear
from model.modes import Mode
from model.quantization import QuantizedWeight, quantize
from model.quantized_linear import make_quantized_linear
from model.weights import BlockWeights, ExpertWeights, MixtralWeights


class RandomModel:
    """With a `mode` all weights of blocks but routers and norms are quantised, each matrix as soon as it is made."""

    def __init__(
        self,
        config: MixtralConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        seed: int = 0,
        mode: Mode | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._dtype = dtype
        self._mode = mode
        self._generator = torch.Generator(device).manual_seed(seed)

    def weights(self) -> MixtralWeights:
        config, D = self._config, self._config.hidden_size
        embedding_VD = torch.empty(config.vocab_size, D, device=self._device, dtype=self._dtype)
        embedding_VD.normal_(generator=self._generator)
        blocks = tuple(self._block() for _ in range(config.num_hidden_layers))
        head = PlainLinear(self._matrix(config.vocab_size, D))
        return MixtralWeights(0, embedding_VD, blocks, self._norm(), head)

    def _block(self) -> BlockWeights:
        config, D = self._config, self._config.hidden_size
        H, G, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        E, F = config.num_local_experts, config.intermediate_size
        gate_up, down = self._linears(E, 2 * F, D), self._linears(E, D, F)
        return BlockWeights(
            self._norm(),
            self._linears(1, (H + 2 * G) * C, D)[0],
            self._linears(1, D, H * C)[0],
            self._norm(),
            self._matrix(E, D),
            tuple(ExpertWeights(g, d) for g, d in zip(gate_up, down, strict=True)),
        )

    def _linears(self, count: int, rows: int, columns: int) -> list[Linear]:
        if self._mode is None:
            weight_EOI = torch.empty(count, rows, columns, device=self._device, dtype=self._dtype)
            weight_EOI.normal_(std=columns**-0.5, generator=self._generator)
            return [PlainLinear(weight_OI) for weight_OI in weight_EOI]
        weights = [quantize(self._matrix(rows, columns), self._mode) for _ in range(count)]
        stacks = torch.stack([w.packed_OP for w in weights]), torch.stack([w.scale_OG for w in weights])
        parts = zip(*stacks, strict=True)
        return [make_quantized_linear(QuantizedWeight(self._mode, *part), self._dtype) for part in parts]

    def _matrix(self, rows: int, columns: int) -> Tensor:
        weight_OI = torch.empty(rows, columns, device=self._device, dtype=self._dtype)
        return weight_OI.normal_(std=columns**-0.5, generator=self._generator)

    def _norm(self) -> Tensor:
        weight_D = torch.empty(self._config.hidden_size, device=self._device, dtype=self._dtype)
        return weight_D.normal_(mean=1.0, std=0.1, generator=self._generator)
