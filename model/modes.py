"""In which modes weights are quantised, and what a matrix takes in each. Numbers alone: what they mean to tensors is in
quantization.py, and who only plans with them does without torch."""

from __future__ import annotations

from typing import Literal

Mode = Literal["int8", "int4", "nf4", "fp8"]

GROUP_SIZE = 64


def weights_per_byte(mode: Mode) -> int:
    return 2 if mode in ("int4", "nf4") else 1


def group_size(mode: Mode) -> int | None:
    """Of the weights that are quantised here; None: a row has one scale."""
    return GROUP_SIZE if mode in ("int4", "nf4") else None


def stored_bytes(mode: Mode, height: int, width: int) -> int:
    """Of a matrix that is quantised here."""
    scales = width // (group_size(mode) or width)
    return height * (width // weights_per_byte(mode) + scales * (4 if mode == "nf4" else 2))
