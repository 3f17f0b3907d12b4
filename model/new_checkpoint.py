"""Writing a checkpoint: weight files whose contents are known before the first byte, in a directory that gets its name
once it is whole.

What the tensors are is convert.py's and quantized_writer.py's business. One matrix at a time is in memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.errors import ConversionError
from model.tensor_files import TensorInfo, write_safetensors

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

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """One matrix of the new checkpoint: the tensors it becomes, and what makes them, in that order."""

    infos: Mapping[str, TensorInfo]
    make: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in self.infos.values())


class WeightFiles:
    """All matrices of the new checkpoint, in order. `progress` hears of bytes written and in total."""

    def __init__(self, planned: list[Planned], progress: Progress | None) -> None:
        self._planned = planned
        self._progress = progress
        self._done = 0
        self.total = sum(each.nbytes for each in planned)

    def write_parts(self, directory: Path) -> None:
        """As Hugging Face has them: one file, or several and an index."""
        parts = list(cut(self._planned, PART_BYTES))
        if len(parts) == 1:
            self._write(directory / "model.safetensors", parts[0])
            return
        names = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            self._write(directory / name, part)
        weight_map = {
            tensor: name for name, part in zip(names, parts, strict=True) for each in part for tensor in each.infos
        }
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)

    def write_whole(self, path: Path) -> None:
        self._write(path, self._planned)

    def _write(self, path: Path, part: list[Planned]) -> None:
        infos = {name: info for each in part for name, info in each.infos.items()}
        write_safetensors(path, infos, self._tensors(part))

    def _tensors(self, part: list[Planned]) -> Iterator[Tensor]:
        for each in part:
            yield from each.make()
            self._done += each.nbytes
            if self._progress is not None:
                self._progress(self._done, self.total)


def cut(planned: list[Planned], limit: int) -> Iterator[list[Planned]]:
    """Parts of at most so many bytes, or of one matrix."""
    part: list[Planned] = []
    room = limit
    for one in planned:
        if part and one.nbytes > room:
            yield part
            part, room = [], limit
        part.append(one)
        room -= one.nbytes
    yield part


def copy_others(source: Path, directory: Path) -> None:
    """What a checkpoint has beside its config and its weights: tokenizer, templates."""
    for path in (path for pattern in COPIED for path in source.glob(pattern) if path.is_file()):
        copy = directory / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


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
