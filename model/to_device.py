"""Small tensors from the host to where they are computed with, without waiting for what the device does meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A GPU fetches from pinned memory by itself; a copy from any other waits until all work before it is done.

    torch keeps the pinned memory for the next one, and gives it out again once it has been fetched.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def numbers(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.tensor, but for the waiting."""
    return to_device(torch.tensor(values, dtype=dtype), device)
