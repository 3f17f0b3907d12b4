"""A device that nobody may wait for: tensors without numbers, on which whatever would wait is an error.

torch's meta device has shapes and no numbers, so reading one, or asking how many there are that satisfy something,
fails by itself. What is left to refuse are copies from the host that would wait until the device has done everything
before them, and operators on tensors of both, which a device would refuse too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")


class Waits(AssertionError):
    """Of what would wait."""


class NoWaiting:
    """Within it, nothing may wait for the device."""

    def __init__(self) -> None:
        self._modes = (_Calls(), _Operators())

    def __enter__(self) -> None:
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)


class _Calls(TorchFunctionMode):
    """Copies as they are asked for, among them what makes tensors of Python's numbers."""

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        there = call is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE
        if there or (call is Tensor.new_tensor and args[0].device == DEVICE):
            raise Waits(f"{call.__name__} on the device")
        if call in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == DEVICE:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(each, list | range) or is_on_host(each) for each in index):
                raise Waits("an index that lies with the host")
        found = call(*args, **kwargs)
        if call is Tensor.to and is_on_host(args[0]) and found.device == DEVICE and not kwargs.get("non_blocking"):
            raise Waits("a copy to the device")
        return found


class _Operators(TorchDispatchMode):
    """Copies into what is there already, and questions of how many."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operator.overloadpacket.__name__
        if name == "copy_" and args[0].device == DEVICE and is_on_host(args[1]):
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            index = args[1] if name in ("index", "index_put", "index_put_") else ()
            waits = any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index)
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            waits |= any(map(is_on_host, tensors)) and any(x.device == DEVICE for x in tensors)
        if waits:
            raise Waits(str(operator))
        return operator(*args, **kwargs)


def is_on_host(value: object) -> bool:
    """Whether it is a tensor of some size there; a single number travels with the kernel that uses it."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() > 0
