"""One rank's tensors, ready to multiply. checkpoint.py makes them; the blocks read their own sizes from them.

D: model width.  V: this rank's rows of the vocabulary.  E: all experts.  F: this rank's slice of the ffn width.
H, G: this rank's query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.layers import Linear


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    gate_up: Linear  # (2F, D): rows that go through the activation, then rows they scale
    down: Linear  # (D, F)


@dataclass(frozen=True, slots=True)
class BlockWeights:
    attention_norm_D: Tensor
    qkv: Linear  # ((H + 2G) * C, D): query heads, key heads, value heads
    output: Linear  # (D, H * C)
    moe_norm_D: Tensor
    router_ED: Tensor
    experts: tuple[ExpertWeights, ...]  # one for each local slot


@dataclass(frozen=True, slots=True)
class MixtralWeights:
    first_token: int  # the token id of row 0 of this rank's part of the vocabulary
    embedding_VD: Tensor
    blocks: tuple[BlockWeights, ...]
    norm_D: Tensor
    head: Linear | None  # (V, D) of a language model; (labels, D) of a classifier, whole on every rank
    head_bias: Tensor | None = None  # of a classifier

    @property
    def nbytes(self) -> int:
        """Of memory that they keep."""
        kept: list[Tensor | Linear | None] = [self.embedding_VD, self.norm_D, self.head, self.head_bias]
        for block in self.blocks:
            kept += [block.attention_norm_D, block.qkv, block.output, block.moe_norm_D, block.router_ED]
            kept += [linear for expert in block.experts for linear in (expert.gate_up, expert.down)]
        return sum(each.nbytes for each in kept if each is not None)
