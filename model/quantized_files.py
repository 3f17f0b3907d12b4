"""How checkpoints spell quantised matrices: which tensors one is made of, and what its config.json says of them.

    compressed-tensors   int4, int8   X.weight_packed  X.weight_scale  X.weight_shape      quantized_compressed.py
                         fp8          X.weight  X.weight_scale
    bitsandbytes         nf4          X.weight  X.weight.absmax  X.weight.quant_map  ...   quantized_bitsandbytes.py

A format answers for one matrix at a time, under its plain name X.weight; where such a file keeps a matrix plain, the
file decides, whatever its config lists as ignored. Reading and opening files is checkpoint_files.py's business.

O, I: features out and in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.modes import Mode
from model.quantization import QuantizedWeight
from model.tensor_files import TensorInfo


class Expected(NamedTuple):
    """What a file must hold under a name; a shape of None is small and of any length."""

    shape: tuple[int, ...] | None
    dtypes: tuple[torch.dtype, ...]


class Slice(NamedTuple):
    """Some of a tensor, seen as a matrix of so many columns; None: all rows, all columns, its own last dimension."""

    name: str
    rows: range | None = None
    columns: range | None = None
    width: int | None = None


class QuantizedFormat(Protocol):
    """How the quantised matrices of one checkpoint lie in its files."""

    @property
    def mode(self) -> Mode: ...

    @property
    def alignment(self) -> int:
        """Columns can be cut out in multiples of this."""

    def holds(self, name: str, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether the matrix of this plain name is there in quantised form."""

    def tensors(self, name: str, shape: tuple[int, int]) -> dict[str, Expected]:
        """All tensors of a matrix of this shape."""

    def slices(self, name: str, shape: tuple[int, int], rows: range, columns: range) -> list[Slice]:
        """What to read for some of its rows and columns, in the order that assemble() takes."""

    def assemble(
        self, name: str, shape: tuple[int, int], rows: range, columns: range, parts: list[Tensor]
    ) -> QuantizedWeight: ...

    def store(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """A whole matrix as the tensors that tensors() names, in that order."""

    def config(self) -> dict[str, Any]:
        """config.json's quantization_config."""


def divided(columns: range, by: int) -> range:
    """The same columns where `by` of them lie together."""
    assert columns.start % by == 0
    assert columns.stop % by == 0
    return range(columns.start // by, columns.stop // by)
