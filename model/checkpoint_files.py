"""The open files of one checkpoint, and matrices out of them as the model wants them, whole or cut for a rank.

How files spell tensors: dialects.py, and quantized_files.py where they are quantised. How tensors lie in files:
tensor_files.py. Who asks: checkpoint.py, to load a rank's weights, convert.py and quantized_writer.py.

O, I: features out and in.  C: head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import MixtralConfig
from model.dialects import HUGGING_FACE, Matrix, Stored, check_tensors, find_dialect, locate
from model.errors import CheckpointError
from model.quantization import QuantizedWeight
from model.quantized_files import QuantizedFormat, Slice
from model.tensor_files import TensorFile, TensorInfo, open_file, shortened, weight_files


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows and columns of a matrix, as the model sees it; None: all."""

    matrix: Matrix
    rows: range | None = None
    columns: range | None = None


class Checkpoint:
    """The open files of one checkpoint, once they hold exactly what the config promises."""

    def __init__(self, directory: Path, config: MixtralConfig) -> None:
        self._config = config
        self._files: list[TensorFile] = []
        self._holder: dict[str, TensorFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        try:
            for path in weight_files(directory):
                self._add(open_file(path))
            # Quantised files are Hugging Face's; which of its tensors are missing is said below.
            self.dialect = find_dialect(self.infos, str(directory)) if config.quantization is None else HUGGING_FACE
            check_tensors(self.dialect, config, self.infos, str(directory))
        except BaseException:
            self.close()
            raise

    def read(self, piece: Piece) -> Tensor:
        """A matrix in the model's own layout, in the file's precision; vectors as matrices of one row.

        A quantised one as what it stands for, in float32.
        """
        if self.is_quantized(piece.matrix):
            return self.read_quantized(piece).dequantize(torch.float32)
        stored, rows, columns = self._where(piece)
        file = self._holder[stored.name]
        matrix = torch.empty(len(rows), len(columns), dtype=self.infos[stored.name].dtype)
        file.read(stored.name, shifted(rows, stored.first_row), columns, matrix)
        if stored.turned:
            matrix = matrix.T.contiguous()
        if self._is_interleaved(piece):
            matrix = halves_from_pairs(matrix, self._config.head_dim)
        return matrix

    def read_into(self, out: Tensor, piece: Piece) -> None:
        """The same, in the precision of `out`; straight from the file where it lies there as it is wanted."""
        stored, rows, columns = self._where(piece)
        if self.lies_as(piece, out.dtype):
            self._holder[stored.name].read(stored.name, shifted(rows, stored.first_row), columns, out)
        else:
            out.copy_(self.read(piece))

    def dtype_of(self, matrix: Matrix) -> torch.dtype:
        """Of what read() gives."""
        return torch.float32 if self.is_quantized(matrix) else self.info_of(matrix)[1].dtype

    def lies_as(self, piece: Piece, dtype: torch.dtype) -> bool:
        """Whether the file has it as the model wants it, in this precision."""
        if self.is_quantized(piece.matrix) or self._is_interleaved(piece) or self._where(piece)[0].turned:
            return False
        return self.dtype_of(piece.matrix) == dtype

    def blocks(self, piece: Piece, size: int) -> Iterator[Piece]:
        """Its rows in their order, about so many numbers at a time; all at once where they are columns of the file."""
        stored, rows, columns = self._where(piece)
        if stored.turned:
            yield piece
            return
        unit = self._config.head_dim if self._is_interleaved(piece) else 1
        height = max(1, size // (unit * len(columns))) * unit
        for first in range(rows.start, rows.stop, height):
            yield replace(piece, rows=range(first, min(first + height, rows.stop)))

    def is_quantized(self, matrix: Matrix) -> bool:
        return self._format_of(matrix) is not None

    def read_quantized(self, piece: Piece, *, pinned: bool = False) -> QuantizedWeight:
        """As it was saved, read into memory that a GPU can fetch from. Columns are multiples of the alignment."""
        saved, (stored, rows, columns) = self._format_of(piece.matrix), self._where(piece)
        assert saved is not None
        parts = []
        for each in saved.slices(stored.name, stored.shape, rows, columns):
            height, width = self._extent(each)
            part = torch.empty(len(height), len(width), dtype=self.infos[each.name].dtype, pin_memory=pinned)
            self._holder[each.name].read(each.name, height, width, part, each.width)
            parts.append(part)
        return saved.assemble(stored.name, stored.shape, rows, columns, parts)

    def shape_of(self, piece: Piece) -> tuple[int, int]:
        stored, rows, columns = self._where(piece)
        return (len(columns), len(rows)) if stored.turned else (len(rows), len(columns))

    def bytes_of(self, piece: Piece) -> int:
        """What reading it asks of the files."""
        if (saved := self._format_of(piece.matrix)) is not None:
            stored, rows, columns = self._where(piece)
            return sum(map(self._slice_bytes, saved.slices(stored.name, stored.shape, rows, columns)))
        height, width = self.shape_of(piece)
        return height * width * self.info_of(piece.matrix)[1].dtype.itemsize

    def info_of(self, matrix: Matrix) -> tuple[str, TensorInfo]:
        """The name and the place of the tensor that a matrix is, or is part of; of its codes if it is quantised."""
        stored, saved = locate(self.dialect, self._config, matrix), self._format_of(matrix)
        name = stored.name if saved is None else next(iter(saved.tensors(stored.name, stored.shape)))
        return name, self.infos[name]

    def _format_of(self, matrix: Matrix) -> QuantizedFormat | None:
        saved = self._config.quantization
        name = locate(self.dialect, self._config, matrix).name
        return saved if saved is not None and saved.holds(name, self.infos) else None

    def _extent(self, piece: Slice) -> tuple[range, range]:
        shape = self.infos[piece.name].shape
        width = piece.width or shape[-1]
        rows = range(math.prod(shape) // width) if piece.rows is None else piece.rows
        return rows, range(width) if piece.columns is None else piece.columns

    def _slice_bytes(self, piece: Slice) -> int:
        rows, columns = self._extent(piece)
        return len(rows) * len(columns) * self.infos[piece.name].dtype.itemsize

    def _is_interleaved(self, piece: Piece) -> bool:
        return self.dialect.interleaved and piece.matrix.part in ("q", "k")

    def _where(self, piece: Piece) -> tuple[Stored, range, range]:
        stored = locate(self.dialect, self._config, piece.matrix)
        rows, columns = (piece.columns, piece.rows) if stored.turned else (piece.rows, piece.columns)
        height, width = stored.shape
        return stored, range(height) if rows is None else rows, range(width) if columns is None else columns

    def _add(self, file: TensorFile) -> None:
        self._files.append(file)
        for name, info in file.infos.items():
            if name in self._holder:
                raise CheckpointError(f"{info.file}: {shortened(name)} is in another file too; keep one of them")
            self._holder[name] = file
            self.infos[name] = info

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def shifted(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by)


def halves_from_pairs(matrix_OI: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from interleaved rotary pairs to halves: 0 1 2 3 4 5 -> 0 2 4 1 3 5."""
    _, width = matrix_OI.shape
    return matrix_OI.view(-1, head_dim // 2, 2, width).transpose(1, 2).reshape(-1, width)


def pairs_from_halves(matrix_OI: Tensor, head_dim: int) -> Tensor:
    """The way back."""
    _, width = matrix_OI.shape
    return matrix_OI.view(-1, 2, head_dim // 2, width).transpose(1, 2).reshape(-1, width)
