"""Mixtral's forward pass for training: the mathematics of `MixtralForCausalLM`, whole sequences, no cache.

Owns the parameters, their Hugging Face names and the router's balancing loss. Knows nothing of text, data or
optimizers. The serving model is model/mixtral.py; this one exists because training wants other things of the
same mathematics: gradients, packed rows, logits for the answer's tokens only.

B: rows of a batch.  L: tokens per row.  T = B * L.  D: width.  H: query heads.  G: key/value heads.  C: width of
a head.  E: experts.  K: experts per token.  F: width inside an expert.  N: positions whose logits are wanted.
V: vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of config.json that the forward pass needs."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    num_experts: int = 8
    experts_per_token: int = 2
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward pass gives. share_LE: per layer, the part of all choices that went to each expert."""

    logits_NV: Tensor
    balance_loss: Tensor
    share_LE: Tensor


def random_matrix(*shape: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * scale * shape[-1] ** -0.5)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x_TD, (x_TD.shape[-1],), weight_D, eps)


def rotation(position_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, the same for both halves of a head."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = position_BL[:, None, :, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BHLC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x_BHLC.chunk(2, dim=-1)
    return x_BHLC * cos + torch.cat((-high, low), dim=-1) * sin


class Block(nn.Module):
    """One transformer block: attention, then the experts that the router chose."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D, width = shape.hidden_size, shape.head_dim
        depth = (2 * shape.num_layers) ** -0.5  # what two branches per block add to the residual stream stays bounded
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(D))
        self.expert_norm = nn.Parameter(torch.ones(D))
        self.q = random_matrix(shape.num_heads * width, D)
        self.k = random_matrix(shape.num_kv_heads * width, D)
        self.v = random_matrix(shape.num_kv_heads * width, D)
        self.o = random_matrix(D, shape.num_heads * width, scale=depth)
        self.gate = random_matrix(shape.num_experts, D)
        self.w13 = random_matrix(shape.num_experts, 2 * shape.intermediate_size, D)  # w1 above w3: one matmul for both
        self.w2 = random_matrix(shape.num_experts, D, shape.intermediate_size, scale=depth)

    def forward(self, x_BLD: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eps = self.shape.norm_eps
        x_BLD = x_BLD + self.attend(rms_norm(x_BLD, self.attention_norm, eps), mask, cos, sin)
        x_TD = rms_norm(x_BLD, self.expert_norm, eps).flatten(0, 1)
        y_TD, balance_loss, share_E = self.mix(x_TD)
        return x_BLD + y_TD.view_as(x_BLD), balance_loss, share_E

    def attend(self, x_BLD: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, L, _ = x_BLD.shape
        width, groups = self.shape.head_dim, self.shape.num_heads // self.shape.num_kv_heads
        q_BHLC = rotate(functional.linear(x_BLD, self.q).view(B, L, -1, width).transpose(1, 2), cos, sin)
        k_BGLC = rotate(functional.linear(x_BLD, self.k).view(B, L, -1, width).transpose(1, 2), cos, sin)
        v_BGLC = functional.linear(x_BLD, self.v).view(B, L, -1, width).transpose(1, 2)
        k_BHLC, v_BHLC = k_BGLC.repeat_interleave(groups, 1), v_BGLC.repeat_interleave(groups, 1)
        y_BHLC = functional.scaled_dot_product_attention(q_BHLC, k_BHLC, v_BHLC, attn_mask=mask)
        return functional.linear(y_BHLC.transpose(1, 2).reshape(B, L, -1), self.o)

    def mix(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every token through its K experts; also the balancing loss and each expert's share of the choices."""
        E, K = self.shape.num_experts, self.shape.experts_per_token
        probability_TE = functional.linear(x_TD, self.gate).float().softmax(dim=-1)
        weight_TK, expert_TK = probability_TE.topk(K, dim=-1)
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)

        # Pairs of token and choice, grouped by expert, so that each expert sees its tokens as one matrix.
        order = expert_TK.flatten().argsort(stable=True)
        rows = torch.bincount(expert_TK.flatten(), minlength=E)
        token = order // K
        outputs = []
        for expert, group in enumerate(torch.split(x_TD.index_select(0, token), rows.tolist())):
            gate, up = functional.linear(group, self.w13[expert]).chunk(2, dim=-1)
            outputs.append(functional.linear(functional.silu(gate) * up, self.w2[expert]))
        weighted = torch.cat(outputs) * weight_TK.flatten()[order, None]
        y_TD = torch.zeros_like(x_TD).index_add(0, token, weighted.to(x_TD.dtype))

        share_E = rows / rows.sum()
        balance_loss = E * (share_E * probability_TE.mean(dim=0)).sum()
        return y_TD, balance_loss, share_E


class Network(nn.Module):
    """The whole model. Rows hold several texts: a token sees only earlier tokens of its own text."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.5)
        self.blocks = [Block(shape) for _ in range(shape.num_layers)]
        for layer, block in enumerate(self.blocks):
            self.add_module(f"block{layer}", block)
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        self.head = random_matrix(shape.vocab_size, shape.hidden_size)

    def forward(self, token_BL: Tensor, position_BL: Tensor, text_BL: Tensor, wanted_N: Tensor) -> Forward:
        """Logits at the flat positions wanted_N. text_BL numbers the texts in a row."""
        L = token_BL.shape[1]
        causal_LL = torch.ones(L, L, dtype=torch.bool).tril()
        mask = ((text_BL[:, :, None] == text_BL[:, None, :]) & causal_LL)[:, None]
        cos, sin = rotation(position_BL, self.shape.head_dim, self.shape.rope_theta)
        x_BLD = functional.embedding(token_BL, self.embedding)
        losses, shares = [], []
        for block in self.blocks:
            x_BLD, balance_loss, share_E = block(x_BLD, mask, cos, sin)
            losses.append(balance_loss)
            shares.append(share_E)
        x_ND = rms_norm(x_BLD.flatten(0, 1)[wanted_N], self.norm, self.shape.norm_eps)
        return Forward(functional.linear(x_ND, self.head), torch.stack(losses).mean(), torch.stack(shares))

    def checkpoint(self) -> dict[str, Tensor]:
        """The weights under Hugging Face's per-expert names."""
        tensors: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm,
            "lm_head.weight": self.head,
        }
        for layer, block in enumerate(self.blocks):
            prefix = f"model.layers.{layer}."
            tensors[prefix + "input_layernorm.weight"] = block.attention_norm
            tensors[prefix + "post_attention_layernorm.weight"] = block.expert_norm
            for name, matrix in (("q", block.q), ("k", block.k), ("v", block.v), ("o", block.o)):
                tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix
            tensors[prefix + "block_sparse_moe.gate.weight"] = block.gate
            for expert in range(self.shape.num_experts):
                w1, w3 = block.w13[expert].chunk(2)
                expert_prefix = f"{prefix}block_sparse_moe.experts.{expert}."
                tensors |= {
                    expert_prefix + "w1.weight": w1,
                    expert_prefix + "w2.weight": block.w2[expert],
                    expert_prefix + "w3.weight": w3,
                }
        return {name: tensor.detach() for name, tensor in tensors.items()}
