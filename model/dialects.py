"""How checkpoints spell Mixtral: the names, the shapes, and where in a file's tensor a matrix of ours begins.

    separate   one tensor per expert and matrix                    Hugging Face, Mistral
    fused      gate_up [E, 2F, D]  down [E, D, F]                  Hugging Face, in memory and in some files
    stacked    w1 [E*F, D]  w3 [E*F, D]  w2 [E*F, D], turned       Mistral's first release

Every matrix is a run of rows of its file's tensor, once leading dimensions are folded into rows.

D: model width.  E: experts.  F: ffn width.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from model.config import Architecture, MixtralConfig
from model.errors import CheckpointError
from model.quantized_files import Expected
from model.tensor_files import DTYPE_NAMES, FLOATS, TensorInfo, shortened, spelled

TopPart = Literal["embedding", "norm", "head", "head_bias"]
BlockPart = Literal["attention_norm", "q", "k", "v", "o", "moe_norm", "router"]
ExpertPart = Literal["gate", "up", "down"]
Part = TopPart | BlockPart | ExpertPart

MAX_SMALL = 4096  # numbers in a tensor that describes another

BLOCK_PARTS: tuple[BlockPart, ...] = ("attention_norm", "q", "k", "v", "o", "moe_norm", "router")
EXPERT_PARTS: tuple[ExpertPart, ...] = ("gate", "up", "down")


class Matrix(NamedTuple):
    """One matrix (or vector) of the model."""

    part: Part
    layer: int = 0
    expert: int = 0


@dataclass(frozen=True, slots=True)
class Dialect:
    names: dict[Part, str]
    experts: Literal["separate", "fused", "stacked"]
    interleaved: bool  # rotary pairs lie beside each other (Mistral) and not half a head apart (Hugging Face)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a matrix lies."""

    name: str
    tensor_shape: tuple[int, ...]  # of the file's tensor
    shape: tuple[int, int]  # of the matrix as the file has it; a vector is one row
    first_row: int = 0
    turned: bool = False  # the file has the transpose of what the model multiplies with


HF_NAMES: dict[Part, str] = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "moe_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}
# A classifier has these instead of the language model's head.
LABEL_HEADS: dict[Architecture, dict[Part, str]] = {
    "MixtralForSequenceClassification": {"head": "score.weight"},
    "MixtralForTokenClassification": {"head": "score.weight", "head_bias": "score.bias"},
    "MixtralForQuestionAnswering": {"head": "qa_outputs.weight", "head_bias": "qa_outputs.bias"},
}
HF_FUSED_NAMES: dict[Part, str] = HF_NAMES | {
    "router": "model.layers.{layer}.mlp.gate.weight",
    "gate": "model.layers.{layer}.mlp.experts.gate_up_proj",
    "up": "model.layers.{layer}.mlp.experts.gate_up_proj",
    "down": "model.layers.{layer}.mlp.experts.down_proj",
}
MISTRAL_NAMES: dict[Part, str] = {
    "embedding": "tok_embeddings.weight",
    "norm": "norm.weight",
    "head": "output.weight",
    "attention_norm": "layers.{layer}.attention_norm.weight",
    "q": "layers.{layer}.attention.wq.weight",
    "k": "layers.{layer}.attention.wk.weight",
    "v": "layers.{layer}.attention.wv.weight",
    "o": "layers.{layer}.attention.wo.weight",
    "moe_norm": "layers.{layer}.ffn_norm.weight",
    "router": "layers.{layer}.feed_forward.gate.weight",
    "gate": "layers.{layer}.feed_forward.experts.{expert}.w1.weight",
    "up": "layers.{layer}.feed_forward.experts.{expert}.w3.weight",
    "down": "layers.{layer}.feed_forward.experts.{expert}.w2.weight",
}
MISTRAL_STACKED_NAMES: dict[Part, str] = MISTRAL_NAMES | {
    "router": "layers.{layer}.block_sparse_moe.gate.weight",
    "gate": "layers.{layer}.block_sparse_moe.w1",
    "up": "layers.{layer}.block_sparse_moe.w3",
    "down": "layers.{layer}.block_sparse_moe.w2",
}


def without_prefix(names: dict[Part, str]) -> dict[Part, str]:
    """As transformers saves a model without a head."""
    return {part: name.removeprefix("model.") for part, name in names.items()}


HUGGING_FACE = Dialect(HF_NAMES, "separate", interleaved=False)
MISTRAL = Dialect(MISTRAL_NAMES, "separate", interleaved=True)
DIALECTS = (
    HUGGING_FACE,
    Dialect(HF_FUSED_NAMES, "fused", interleaved=False),
    Dialect(without_prefix(HF_NAMES), "separate", interleaved=False),
    Dialect(without_prefix(HF_FUSED_NAMES), "fused", interleaved=False),
    MISTRAL,
    Dialect(MISTRAL_STACKED_NAMES, "stacked", interleaved=True),
)


def find_dialect(infos: Mapping[str, TensorInfo], source: str) -> Dialect:
    """The dialect whose first expert is there."""
    for dialect in DIALECTS:
        if dialect.names["gate"].format(layer=0, expert=0) in infos:
            return dialect
    wanted = " or ".join(dialect.names["gate"].format(layer=0, expert=0) for dialect in DIALECTS)
    raise CheckpointError(f"{source}: no Mixtral weights; looked for {wanted}")


def all_matrices(config: MixtralConfig) -> Iterator[Matrix]:
    yield Matrix("embedding")
    yield Matrix("norm")
    if config.has_head and not (config.is_language_model and config.tie_word_embeddings):
        yield Matrix("head")
    if config.has_head_bias:
        yield Matrix("head_bias")
    for layer in range(config.num_hidden_layers):
        for part in BLOCK_PARTS:
            yield Matrix(part, layer)
        for expert in range(config.num_local_experts):
            for expert_part in EXPERT_PARTS:
                yield Matrix(expert_part, layer, expert)


def locate(dialect: Dialect, config: MixtralConfig, matrix: Matrix) -> Stored:
    D, F, E, C = config.hidden_size, config.intermediate_size, config.num_local_experts, config.head_dim
    names = dialect.names | LABEL_HEADS.get(config.architecture, {})
    name = names[matrix.part].format(layer=matrix.layer, expert=matrix.expert)
    fused, stacked = dialect.experts == "fused", dialect.experts == "stacked"
    match matrix.part:
        case "embedding":
            shape = (config.vocab_size, D)
        case "head":
            shape = (len(config.labels) or config.vocab_size, D)
        case "head_bias":
            return Stored(name, (len(config.labels),), (1, len(config.labels)))
        case "norm" | "attention_norm" | "moe_norm":
            return Stored(name, (D,), (1, D))
        case "q":
            shape = (config.num_attention_heads * C, D)
        case "k" | "v":
            shape = (config.num_key_value_heads * C, D)
        case "o":
            shape = (D, config.num_attention_heads * C)
        case "router":
            shape = (E, D)
        case "gate" | "up" if fused:
            return Stored(name, (E, 2 * F, D), (F, D), (2 * matrix.expert + (matrix.part == "up")) * F)
        case "down" if fused:
            return Stored(name, (E, D, F), (D, F), matrix.expert * D)
        case "gate" | "up" | "down" if stacked:
            return Stored(name, (E * F, D), (F, D), matrix.expert * F, turned=matrix.part == "down")
        case "gate" | "up":
            shape = (F, D)
        case "down":
            shape = (D, F)
    return Stored(name, shape, shape)


def check_tensors(dialect: Dialect, config: MixtralConfig, infos: Mapping[str, TensorInfo], source: str) -> None:
    """Every tensor of the model is there in its shape, and nothing else is."""
    expected: dict[str, Expected] = {}
    for matrix in all_matrices(config):
        stored, quantized = locate(dialect, config, matrix), config.quantization
        if quantized is not None and quantized.holds(stored.name, infos):
            expected |= quantized.tensors(stored.name, stored.shape)
        else:
            expected[stored.name] = Expected(stored.tensor_shape, FLOATS)
    for name, (shape, dtypes) in expected.items():
        check_tensor(name, shape, dtypes, infos, source)
    tied = {dialect.names["head"]} if config.is_language_model and config.tie_word_embeddings else set()
    for name, info in infos.items():
        # A tied head, saved or not, is the embedding for transformers, and so it is for us. Old files carry rotary
        # frequencies, which can be computed.
        if name not in expected and name not in tied and not name.endswith(".rotary_emb.inv_freq"):
            raise CheckpointError(f"{info.file}: {shortened(name)} is no part of the Mixtral its config describes")


def check_tensor(
    name: str,
    shape: tuple[int, ...] | None,
    dtypes: tuple[torch.dtype, ...],
    infos: Mapping[str, TensorInfo],
    source: str,
) -> None:
    info = infos.get(name)
    if info is None:
        raise CheckpointError(f"{source}: {name} is missing from the {len(infos)} tensors that are there")
    if shape is not None and info.shape != shape:
        raise CheckpointError(f"{info.file}: {name} has shape {info.shape}; its config promises {shape}")
    if shape is None and not (len(info.shape) == 1 and 1 <= info.shape[0] <= MAX_SMALL):
        raise CheckpointError(f"{info.file}: {name} has shape {info.shape}, not 1 to {MAX_SMALL} numbers in a row")
    if info.dtype not in dtypes:
        raise CheckpointError(f"{info.file}: {name} is {DTYPE_NAMES[info.dtype]}; served are {spelled(dtypes)}")
