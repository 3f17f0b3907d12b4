"""From Mistral's layout of a checkpoint to Hugging Face's and back: the same weights, bit for bit, under other names.

    config.json   model.safetensors, or parts of it and an index     rotary pairs half a head apart
    params.json   consolidated.safetensors                           rotary pairs beside each other

One matrix at a time is in memory. The new directory gets its name once it is whole.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.checkpoint import Progress
from model.checkpoint_files import Checkpoint, Piece, pairs_from_halves
from model.config import MISTRAL_LENGTH, MISTRAL_SPELLING, MixtralConfig, load_config
from model.dialects import HUGGING_FACE, MISTRAL, Dialect, Matrix, all_matrices, locate
from model.errors import ConversionError
from model.tensor_files import TensorInfo, write_safetensors

Layout = Literal["huggingface", "mistral"]

PART_BYTES = 5_000_000_000  # of Hugging Face's layout: what hubs and file systems take without complaint

COPIED = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)

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
        conversion = Conversion(checkpoint, config, HUGGING_FACE if to == "huggingface" else MISTRAL, progress)
        with new_directory(target, conversion.total) as directory:
            if to == "huggingface":
                conversion.write_hugging_face(directory)
            else:
                conversion.write_mistral(directory)
            for path in (path for pattern in COPIED for path in source.glob(pattern) if path.is_file()):
                copy = directory / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def refuse_what_cannot_be_said(source: Path, config: MixtralConfig, dialect: Dialect, to: Layout) -> None:
    if dialect.interleaved == (to == "mistral"):
        raise ConversionError(f"{source} is in the {to} layout already")
    if not config.is_language_model:
        raise ConversionError(f"{source} is a {config.architecture}; Mistral's layout is of language models alone")
    kind = config.rope_parameters.rope_type
    if kind != "default":
        raise ConversionError(f"{source} has {kind} rotary embedding; Mistral's layout knows the plain one alone")


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the new checkpoint."""

    matrix: Matrix
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Conversion:
    """What the new weight files hold, known before the first byte is written."""

    def __init__(
        self, checkpoint: Checkpoint, config: MixtralConfig, dialect: Dialect, progress: Progress | None
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._dialect = dialect
        self._progress = progress
        self._planned = [self._plan(matrix) for matrix in all_matrices(config)]
        self._done = 0
        self.total = sum(planned.nbytes for planned in self._planned)

    def write_hugging_face(self, directory: Path) -> None:
        write_json(directory / "config.json", config_json(self._config, self._planned[0].dtype))
        parts = list(cut(self._planned, PART_BYTES))
        if len(parts) == 1:
            self._write(directory / "model.safetensors", parts[0])
            return
        names = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            self._write(directory / name, part)
        weight_map = {planned.name: name for name, part in zip(names, parts, strict=True) for planned in part}
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)

    def write_mistral(self, directory: Path) -> None:
        write_json(directory / "params.json", params_json(self._config))
        self._write(directory / "consolidated.safetensors", self._planned)

    def _plan(self, matrix: Matrix) -> Planned:
        stored = locate(self._dialect, self._config, matrix)
        _, info = self._checkpoint.info_of(matrix)
        return Planned(matrix, stored.name, stored.tensor_shape, info.dtype)

    def _write(self, path: Path, part: list[Planned]) -> None:
        infos = {planned.name: TensorInfo(path, planned.shape, planned.dtype) for planned in part}
        write_safetensors(path, infos, self._tensors(part))

    def _tensors(self, part: list[Planned]) -> Iterator[Tensor]:
        for planned in part:
            tensor = self._checkpoint.read(Piece(planned.matrix))
            if self._dialect.interleaved and planned.matrix.part in ("q", "k"):
                tensor = pairs_from_halves(tensor, self._config.head_dim)
            yield tensor.view(planned.shape)
            self._done += planned.nbytes
            if self._progress is not None:
                self._progress(self._done, self.total)


def cut(planned: list[Planned], limit: int) -> Iterator[list[Planned]]:
    """Parts of at most so many bytes, or of one tensor."""
    part: list[Planned] = []
    room = limit
    for one in planned:
        if part and one.nbytes > room:
            yield part
            part, room = [], limit
        part.append(one)
        room -= one.nbytes
    yield part


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


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_directory(target: Path, size: int) -> Iterator[Path]:
    """Where to write `size` bytes and a little more; it becomes `target` if all went well, and goes if not."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(f"{target} exists already: name a directory that does not, or an empty one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise ConversionError(f"{target} needs {size} bytes and the disk has {free} free")
        unfinished = target.with_name(f"{target.name}.unfinished")
        if unfinished.exists():
            raise ConversionError(f"{unfinished} is in the way: another conversion runs, or was killed; then remove it")
        unfinished.mkdir()
        try:
            yield unfinished
            unfinished.rename(target)
        except BaseException:
            shutil.rmtree(unfinished)
            raise
    except OSError as error:
        raise ConversionError(f"{target} cannot be written: {error.strerror}") from error
