"""Tiny Mixtral checkpoints for tests: random weights, a real SentencePiece tokenizer, Hugging Face's layout."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] }}{{ eos_token }}{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)

TEXT = """a router looks at every token and chooses two of the experts to answer it
the quick brown fox jumps over the lazy dog while five boxing wizards watch
tokens travel to the rank that holds their expert and come back weighted
pages of keys and values remember what was said before this word was read"""


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face's per-expert names, large enough that greedy choices are no ties."""
    generator = torch.Generator().manual_seed(seed)
    D, F = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or D // heads

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (2.0 / shape[-1] ** 0.5)

    tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], D, generator=generator)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = 1 + 0.1 * torch.randn(D, generator=generator)
        tensors[prefix + "post_attention_layernorm.weight"] = 1 + 0.1 * torch.randn(D, generator=generator)
        tensors[prefix + "self_attn.q_proj.weight"] = random(heads * head_dim, D)
        tensors[prefix + "self_attn.k_proj.weight"] = random(kv_heads * head_dim, D)
        tensors[prefix + "self_attn.v_proj.weight"] = random(kv_heads * head_dim, D)
        tensors[prefix + "self_attn.o_proj.weight"] = random(D, heads * head_dim)
        moe = prefix + "block_sparse_moe."
        tensors[moe + "gate.weight"] = random(config["num_local_experts"], D)
        for expert in range(config["num_local_experts"]):
            tensors[f"{moe}experts.{expert}.w1.weight"] = random(F, D)
            tensors[f"{moe}experts.{expert}.w2.weight"] = random(D, F)
            tensors[f"{moe}experts.{expert}.w3.weight"] = random(F, D)
    tensors["model.norm.weight"] = 1 + 0.1 * torch.randn(D, generator=generator)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(config["vocab_size"], D)
    return tensors


@cache
def sentencepiece_model(vocab_size: int = 384) -> bytes:
    import sentencepiece  # tests on a GPU take only weights from here

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def write_checkpoint(directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint directory as `save_pretrained` leaves it."""
    config = CONFIG | overrides
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights(config, seed), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    return directory
