"""A checkpoint whose projections are quantised, from a plain one of any dialect: `mixtral-serve quantize`.

Codes and scales are those that loading the plain one with the same mode would make. Names are Hugging Face's, formats
those of quantized_config.format_for, so that other programs read it too. One matrix at a time is in memory; the new
directory gets its name once it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint_files import Checkpoint, Piece
from model.config import MixtralConfig, load_config
from model.convert import config_json
from model.dialects import EXPERT_PARTS, HUGGING_FACE, Matrix, Part, all_matrices, locate
from model.errors import ConversionError
from model.fields import read_json
from model.modes import Mode
from model.new_checkpoint import Planned, Progress, WeightFiles, copy_others, new_directory, write_json
from model.quantization import QuantizedWeight, quantize
from model.quantized_config import format_for
from model.quantized_slices import loading_mode
from model.shard import Shard
from model.tensor_files import TensorInfo

QUANTIZED_PARTS: tuple[Part, ...] = ("q", "k", "v", "o", *EXPERT_PARTS)


def quantize_checkpoint(source: Path, target: Path, mode: Mode, progress: Progress | None = None) -> None:
    """Write the new directory `target`. `progress` hears of bytes written and in total."""
    config = load_config(source)
    if config.quantization is not None:
        raise ConversionError(f"{source} holds {config.quantization.mode} weights; quantise what they came from")
    loading_mode(config, Shard(), mode)
    with Checkpoint(source, config) as checkpoint:
        files = WeightFiles(list(planned(checkpoint, config, mode)), progress)
        with new_directory(target, files.total) as directory:
            own, (_, info) = source / "config.json", checkpoint.info_of(Matrix("embedding"))
            fields = read_json(own) if own.is_file() else config_json(config, info.dtype)
            write_json(directory / "config.json", fields | {"quantization_config": format_for(mode).config()})
            files.write_parts(directory)
            copy_others(source, directory)


def planned(checkpoint: Checkpoint, config: MixtralConfig, mode: Mode) -> Iterator[Planned]:
    saved = format_for(mode)
    # Shapes and types without numbers: the code that will make the tensors says what they will be.
    empty: dict[tuple[int, int], QuantizedWeight] = {}
    for matrix in all_matrices(config):
        stored = locate(HUGGING_FACE, config, matrix)
        _, info = checkpoint.info_of(matrix)
        if matrix.part not in QUANTIZED_PARTS:
            new = TensorInfo(info.file, stored.tensor_shape, info.dtype)
            yield Planned({stored.name: new}, partial(plain, checkpoint, matrix, stored.tensor_shape))
            continue
        if stored.shape not in empty:
            empty[stored.shape] = quantize(torch.empty(stored.shape, device="meta"), mode)
        tensors = saved.store(stored.name, empty[stored.shape])
        infos = {name: TensorInfo(info.file, tuple(x.shape), x.dtype) for name, x in tensors.items()}
        yield Planned(infos, partial(quantized, checkpoint, matrix, stored.name, mode))


def plain(checkpoint: Checkpoint, matrix: Matrix, shape: tuple[int, ...]) -> list[Tensor]:
    return [checkpoint.read(Piece(matrix)).view(shape)]


def quantized(checkpoint: Checkpoint, matrix: Matrix, name: str, mode: Mode) -> list[Tensor]:
    weight = quantize(checkpoint.read(Piece(matrix)), mode)
    return list(format_for(mode).store(name, weight).values())
