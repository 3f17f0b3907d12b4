"""The demo model's directory: config, weights, tokenizer and chat template, as transformers writes and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.demo.data import BOS, EOS
from model.demo.network import Network, Shape

CONTEXT = 2048  # the longest rows of training
# A system message goes before the first user message, as in Mistral's own format.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] + '\n\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{{- bos_token -}}"
    "{%- for message in turns -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('After an optional system message, roles must alternate user, assistant, user, ...') -}}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


def config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        # Stored in bfloat16 to be small, served in float32: both names, for old readers and new.
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def write(directory: Path, network: Network, tokenizer: bytes) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.json": config(network.shape),
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(tokenizer)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in network.checkpoint().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read(directory: Path) -> tuple[Network, bytes]:
    """The network in float32, holding exactly the stored bfloat16 values, and the tokenizer."""
    stored = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    network = Network(Shape(vocab_size=stored["vocab_size"]))
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in network.checkpoint().items():
        tensor.copy_(tensors[name])
    return network, (directory / "tokenizer.model").read_bytes()
