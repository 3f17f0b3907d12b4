"""From Mistral's layout of a checkpoint to Hugging Face's and back: the same weights, bit for bit, under other names.

    config.json   model.safetensors, or parts of it and an index     rotary pairs half a head apart
    params.json   consolidated.safetensors                           rotary pairs beside each other

One matrix at a time is in memory. The new directory gets its name once it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.checkpoint_files import Checkpoint, Piece, pairs_from_halves
from model.config import MISTRAL_LENGTH, MISTRAL_SPELLING, MixtralConfig, load_config
from model.dialects import HUGGING_FACE, MISTRAL, Dialect, Matrix, all_matrices, locate
from model.errors import ConversionError
from model.new_checkpoint import Planned, Progress, WeightFiles, copy_others, new_directory, write_json
from model.tensor_files import TensorInfo

Layout = Literal["huggingface", "mistral"]

# Fields that both layouts have, in our names.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)
EXPERT_SIZES = ("num_local_experts", "num_experts_per_tok")


def convert(source: Path, target: Path, to: Layout, progress: Progress | None = None) -> None:
    """Write the checkpoint in `source` to the new directory `target`. `progress` hears of bytes done and in total."""
    config = load_config(source)
    with Checkpoint(source, config) as checkpoint:
        refuse_what_cannot_be_said(source, config, checkpoint.dialect, to)
        matrices = list(planned(checkpoint, config, HUGGING_FACE if to == "huggingface" else MISTRAL))
        files = WeightFiles(matrices, progress)
        with new_directory(target, files.total) as directory:
            if to == "huggingface":
                _, info = checkpoint.info_of(Matrix("embedding"))
                write_json(directory / "config.json", config_json(config, info.dtype))
                files.write_parts(directory)
            else:
                write_json(directory / "params.json", params_json(config))
                files.write_whole(directory / "consolidated.safetensors")
            copy_others(source, directory)


def refuse_what_cannot_be_said(source: Path, config: MixtralConfig, dialect: Dialect, to: Layout) -> None:
    if config.quantization is not None:
        raise ConversionError(f"{source} holds {config.quantization.mode} weights; convert what they came from")
    if dialect.interleaved == (to == "mistral"):
        raise ConversionError(f"{source} is in the {to} layout already")
    if not config.is_language_model:
        raise ConversionError(f"{source} is a {config.architecture}; Mistral's layout is of language models alone")
    kind = config.rope_parameters.rope_type
    if kind != "default":
        raise ConversionError(f"{source} has {kind} rotary embedding; Mistral's layout knows the plain one alone")


def planned(checkpoint: Checkpoint, config: MixtralConfig, dialect: Dialect) -> Iterator[Planned]:
    for matrix in all_matrices(config):
        stored = locate(dialect, config, matrix)
        _, info = checkpoint.info_of(matrix)
        new = TensorInfo(info.file, stored.tensor_shape, info.dtype)
        yield Planned({stored.name: new}, partial(converted, checkpoint, config, dialect, matrix, stored.tensor_shape))


def converted(
    checkpoint: Checkpoint, config: MixtralConfig, dialect: Dialect, matrix: Matrix, shape: tuple[int, ...]
) -> list[Tensor]:
    tensor = checkpoint.read(Piece(matrix))
    if dialect.interleaved and matrix.part in ("q", "k"):
        tensor = pairs_from_halves(tensor, config.head_dim)
    return [tensor.view(shape)]


def config_json(config: MixtralConfig, dtype: torch.dtype) -> dict[str, Any]:
    eos = config.eos_token_id
    return {
        "architectures": [config.architecture],
        "model_type": "mixtral",
        **{name: getattr(config, name) for name in SIZES + EXPERT_SIZES},
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_parameters.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def params_json(config: MixtralConfig) -> dict[str, Any]:
    """Mistral's own tools know a few fields; what those cannot say is added only where it is not the default."""

    def spelled(names: tuple[str, ...]) -> dict[str, Any]:
        return {MISTRAL_SPELLING.get(name, name): getattr(config, name) for name in names}

    params = spelled(SIZES) | {"rope_theta": config.rope_parameters.rope_theta, "moe": spelled(EXPERT_SIZES)}
    if config.max_position_embeddings != MISTRAL_LENGTH:
        params |= spelled(("max_position_embeddings",))
    if config.sliding_window is not None:
        params |= spelled(("sliding_window",))
    if config.tie_word_embeddings:
        params |= spelled(("tie_word_embeddings",))
    if config.bos_token_id != 1:
        params |= spelled(("bos_token_id",))
    if config.eos_token_id != (2,):
        params |= spelled(("eos_token_id",))
    return params
