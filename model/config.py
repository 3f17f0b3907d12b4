"""What a checkpoint says about itself, in Hugging Face's names: config.json, or Mistral's params.json.

Every field is honoured, refused by name, or known to have no effect on serving; the rest is listed in `unknown`.
Defaults are those of `transformers`, so that one file means one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from model.errors import ConfigError
from model.fields import Fields, read_json
from model.rope_parameters import RopeParameters, read_rope
from model.shard import Shard

if TYPE_CHECKING:
    from model.quantized_files import QuantizedFormat

DtypeName = Literal["float32", "bfloat16", "float16"]

Architecture = Literal[
    "MixtralModel",
    "MixtralForCausalLM",
    "MixtralForSequenceClassification",
    "MixtralForTokenClassification",
    "MixtralForQuestionAnswering",
]

ARCHITECTURES = (
    "MixtralModel",
    "MixtralForCausalLM",
    "MixtralForSequenceClassification",
    "MixtralForTokenClassification",
    "MixtralForQuestionAnswering",
)
MAX_LABELS = 4096
DTYPES = ("float32", "bfloat16", "float16")

# Training, bookkeeping, and what transformers' own forward pass does with its outputs.
WITHOUT_EFFECT = (
    "_name_or_path",
    "attention_dropout",
    "classifier_dropout",
    "initializer_range",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "transformers_version",
    "use_cache",
)

# Our names -> params.json's. Its "moe" object is read as if it lay at the top.
MISTRAL_SPELLING = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "max_position_embeddings": "max_seq_len",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "num_key_value_heads": "n_kv_heads",
    "num_local_experts": "num_experts",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
}

MISTRAL_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "vocab_size",
)
MISTRAL_LENGTH = 32768  # what 8x7B was trained with; its params.json does not say


@dataclass(frozen=True, slots=True)
class MixtralConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    sliding_window: int | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    dtype: DtypeName | None  # as saved; None: the file does not say
    architecture: Architecture = "MixtralForCausalLM"
    labels: tuple[str, ...] = ()  # what a classifier's outputs mean; empty for a language model
    token_classification_bias: bool = True
    quantization: QuantizedFormat | None = None  # how its matrices were saved; None: plain
    without_effect: tuple[str, ...] = ()  # fields present that change nothing here
    unknown: tuple[str, ...] = ()  # fields present that nobody here knows: worth a warning

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> MixtralConfig:
        """From Hugging Face's config.json. `source` names the file in errors."""
        renamed = "num_experts" in raw and "num_local_experts" not in raw
        fields = Fields(raw, source, {"num_local_experts": "num_experts"} if renamed else None)
        fields.only("model_type", "mixtral")
        fields.only("is_encoder_decoder", False)
        fields.only("per_layer_config", {})
        table = fields.table("quantization_config")
        config = cls._read(fields)
        if not table:
            return config
        from model.quantized_config import read_quantization  # and torch with it, which takes a second

        return replace(config, quantization=read_quantization(fields, table))

    @classmethod
    def from_params(cls, raw: Mapping[str, Any], source: str) -> MixtralConfig:
        """From Mistral's params.json."""
        moe = Fields(raw, source).table("moe")
        flat = {"max_seq_len": MISTRAL_LENGTH} | {name: raw[name] for name in raw if name != "moe"} | moe
        fields = Fields(flat, source, MISTRAL_SPELLING)
        for name in MISTRAL_REQUIRED:
            if fields.raw(name) is None:
                fields.refuse(name, "is missing, so this describes no Mixtral")
        for name in ("llama_4_scaling", "lora", "quantization", "vision_encoder", "yarn"):
            fields.only(name, {})
        return cls._read(fields)

    @classmethod
    def _read(cls, fields: Fields) -> MixtralConfig:
        hidden = fields.integer("hidden_size", 4096, high=1 << 17)
        heads = fields.integer("num_attention_heads", 32, high=1 << 12)
        # Absent means transformers' default, null means as many as query heads.
        kv_default = 8 if fields.absent("num_key_value_heads") else heads
        kv_heads = fields.integer("num_key_value_heads", kv_default, high=1 << 12)
        if heads % kv_heads:
            fields.refuse("num_key_value_heads", f"is {kv_heads} and must divide num_attention_heads, {heads}")
        head_dim = fields.optional_integer("head_dim", low=2, high=1 << 12)
        if head_dim is None and hidden % heads:
            fields.refuse(
                "num_attention_heads", f"is {heads} and must divide hidden_size, {hidden}, or head_dim be set"
            )
        head_dim = head_dim or hidden // heads
        if head_dim % 2:
            fields.refuse("head_dim", f"is {head_dim} and must be even: rotary embedding turns pairs")
        experts = fields.integer("num_local_experts", 8, high=1 << 12)
        per_token = fields.integer("num_experts_per_tok", 2, high=experts)
        if fields.raw("hidden_act") not in (None, "silu", "swish"):
            fields.refuse("hidden_act", "must be silu, the only activation Mixtral was trained with")
        length = fields.integer("max_position_embeddings", 4096 * 32, high=1 << 27)
        vocab = fields.integer("vocab_size", 32000, high=1 << 24)
        bos = fields.optional_integer("bos_token_id", low=0, high=vocab - 1)
        # Absent means transformers' default, null that no token ends a text.
        eos = fields.integers("eos_token_id", (2,) if fields.absent("eos_token_id") else (), high=vocab - 1)
        architecture = read_architecture(fields)
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size", 14336, high=1 << 20),
            num_hidden_layers=fields.integer("num_hidden_layers", 32, high=1 << 12),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            num_local_experts=experts,
            num_experts_per_tok=per_token,
            max_position_embeddings=length,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
            rope_parameters=read_rope(fields, length, head_dim),
            sliding_window=fields.optional_integer("sliding_window", high=1 << 27),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            bos_token_id=1 if fields.absent("bos_token_id") else bos,
            eos_token_id=eos,
            dtype=read_dtype(fields),
            architecture=architecture,
            labels=read_labels(fields, architecture),
            token_classification_bias=fields.boolean("token_classification_bias", True),
            without_effect=fields.present(WITHOUT_EFFECT),
            unknown=fields.left_over(),
        )

    @property
    def is_language_model(self) -> bool:
        return self.architecture == "MixtralForCausalLM"

    @property
    def has_head(self) -> bool:
        return self.architecture != "MixtralModel"

    @property
    def has_head_bias(self) -> bool:
        match self.architecture:
            case "MixtralForTokenClassification":
                return self.token_classification_bias
            case "MixtralForQuestionAnswering":
                return True
            case _:
                return False

    def head_slices(self, shard: Shard) -> tuple[range, range]:
        """The query heads of one tensor rank, and the key-value heads they look at.

        4 query heads, 2 key-value heads:   2 ranks  q 0 1 | 2 3   kv 0 | 1
                                            4 ranks  q 0 | 1 | 2 | 3   kv 0 | 0 | 1 | 1
        """
        heads, kv_heads, size = self.num_attention_heads, self.num_key_value_heads, shard.tensor_size
        if heads % size or (kv_heads % size and size % kv_heads):
            raise ConfigError(
                f"tensor parallel {size} does not fit {heads} query and {kv_heads} key-value heads: "
                f"choose a size that divides {heads} and either divides {kv_heads} or is a multiple of it"
            )
        local, group = heads // size, heads // kv_heads
        queries = range(shard.tensor_rank * local, (shard.tensor_rank + 1) * local)
        return queries, range(queries[0] // group, queries[-1] // group + 1)

    def local_kv_heads(self, shard: Shard) -> int:
        return len(self.head_slices(shard)[1])


def load_config(directory: Path) -> MixtralConfig:
    """From whichever of config.json and params.json the directory holds, the first where it holds both."""
    hugging_face, mistral = directory / "config.json", directory / "params.json"
    if hugging_face.is_file():
        return MixtralConfig.from_dict(read_json(hugging_face), str(hugging_face))
    if mistral.is_file():
        return MixtralConfig.from_params(read_json(mistral), str(mistral))
    raise ConfigError(f"{directory} holds neither config.json nor params.json: point at a checkpoint directory")


def read_architecture(fields: Fields) -> Architecture:
    value = fields.raw("architectures")
    if value is None:
        return "MixtralForCausalLM"
    if not isinstance(value, list) or len(value) != 1 or value[0] not in ARCHITECTURES:
        fields.refuse("architectures", f"must name one of {', '.join(ARCHITECTURES)}")
    return cast(Architecture, value[0])


def read_labels(fields: Fields, architecture: Architecture) -> tuple[str, ...]:
    """What each output of a classifier means: id2label, or LABEL_0, LABEL_1, ... as transformers names them."""
    names, count = fields.table("id2label"), fields.integer("num_labels", 2, high=MAX_LABELS)
    match architecture:
        case "MixtralForCausalLM" | "MixtralModel":
            return ()
        case "MixtralForQuestionAnswering":
            return ("start", "end")
    if not names:
        return tuple(f"LABEL_{index}" for index in range(count))
    labels = tuple(names.get(str(index)) for index in range(min(len(names), MAX_LABELS)))
    if len(names) > MAX_LABELS or not all(isinstance(label, str) and len(label) <= 256 for label in labels):
        fields.refuse("id2label", f"must map 0, 1, ... to at most {MAX_LABELS} names of at most 256 characters")
    return cast("tuple[str, ...]", labels)


def read_dtype(fields: Fields) -> DtypeName | None:
    name = "torch_dtype" if fields.absent("dtype") else "dtype"
    fields.raw("torch_dtype")  # where a file says both, the newer spelling counts
    return cast("DtypeName | None", fields.choice(name, None, DTYPES))
