"""The open files of one checkpoint, and matrices out of them as the model wants them, whole or cut for a rank.

How files spell tensors: dialects.py. How tensors lie in files: tensor_files.py. Who asks: checkpoint.py, to load a
rank's weights, and convert.py.

O, I: features out and in.  C: head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.config import MixtralConfig
from model.dialects import Matrix, Stored, check_tensors, find_dialect, locate
from model.errors import CheckpointError
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
        try:
            for path in weight_files(directory):
                self._add(open_file(path))
            self.dialect = find_dialect(self.infos, str(directory))
            check_tensors(self.dialect, config, self.infos, str(directory))
        except BaseException:
            self.close()
            raise

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: file.infos[name] for name, file in self._holder.items()}

    def read(self, piece: Piece) -> Tensor:
        """A matrix in the model's own layout, in the file's precision; vectors as matrices of one row."""
        stored, rows, columns = self._where(piece)
        file = self._holder[stored.name]
        matrix = torch.empty(len(rows), len(columns), dtype=file.infos[stored.name].dtype)
        file.read(stored.name, shifted(rows, stored.first_row), columns, matrix)
        if stored.turned:
            matrix = matrix.T.contiguous()
        if self._is_interleaved(piece):
            matrix = halves_from_pairs(matrix, self._config.head_dim)
        return matrix

    def read_into(self, out: Tensor, piece: Piece) -> None:
        """The same, in the precision of `out`; straight from the file where it lies there as it is wanted."""
        stored, rows, columns = self._where(piece)
        file = self._holder[stored.name]
        if stored.turned or self._is_interleaved(piece) or file.infos[stored.name].dtype != out.dtype:
            out.copy_(self.read(piece))
        else:
            file.read(stored.name, shifted(rows, stored.first_row), columns, out)

    def shape_of(self, piece: Piece) -> tuple[int, int]:
        stored, rows, columns = self._where(piece)
        return (len(columns), len(rows)) if stored.turned else (len(rows), len(columns))

    def bytes_of(self, piece: Piece) -> int:
        height, width = self.shape_of(piece)
        return height * width * self.info_of(piece.matrix)[1].dtype.itemsize

    def info_of(self, matrix: Matrix) -> tuple[str, TensorInfo]:
        """The name and the place of the tensor that a matrix is, or is part of."""
        name = locate(self.dialect, self._config, matrix).name
        return name, self._holder[name].infos[name]

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
