"""The compiled kernels for CPUs, where there are any: found, and asked whether this processor has their instructions.

    pip install  compiles *.c to _kernels*.so beside this file, if there is a C compiler
    here         opens it, and gives it the threads of torch's own OpenMP: a second pool would fight for the cores

Knows addresses and sizes, no tensors' meaning. Whoever calls a kernel answers for shapes, types and strides.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAPS = Path("/proc/self/maps")
OPENMP = ("libgomp", "libiomp", "libomp")
VERSION = 1  # of what ARGUMENTS says; simd.h has the same
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14

Address = ctypes.c_void_p
Size = ctypes.c_int64
Real = ctypes.c_float

ARGUMENTS: dict[str, str] = {  # a: address, n: number, r: real
    "pack": "annan",
    "linear": "anna nnan",
    "experts": "aan aann aan",
    "turn_and_store": "annnn aaaaa n",
    "attend": "an annnn aa aaa ran an",
    "attend_chunks": "aannnnn aaa rna an",
    "bytes_of_room": "nn",
    "norm": "anna ran",
    "add_norm": "aanna raan",
    "route": "anna nn aaan",
    "dispatch": "aannnn aaaan",
    "combine": "aaannn an",
}
TYPES = {"a": Address, "n": Size, "r": Real}


def kernels() -> ctypes.CDLL:
    """Whoever calls one has asked has_kernels()."""
    library = find()
    assert isinstance(library, ctypes.CDLL)
    return library


def has_kernels() -> bool:
    return isinstance(find(), ctypes.CDLL)


@functools.cache
def find() -> ctypes.CDLL | str:
    """The library, or why torch's own operators have to do its work."""
    found = open_library(Path(__file__).parent)
    if isinstance(found, str):
        logger.info("no compiled CPU kernels, torch's own operators do their work: %s", found)
    return found


def open_library(directory: Path) -> ctypes.CDLL | str:
    compiled = sorted(directory.glob("_kernels*.so"))
    if not compiled:
        return "not compiled: install a C compiler (gcc), then the project again"
    try:
        _share_openmp()
        library = ctypes.CDLL(str(compiled[0]))
    except OSError as error:
        return f"they do not load: {error}"
    if library.version() != VERSION:
        return "compiled from another version: install the project again"
    if not library.supported():
        return "this processor has no AVX-512 with bfloat16, or what compiled them was not GCC 11 or newer"
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [TYPES[letter] for letter in arguments.replace(" ", "")]
        function.restype = None
    library.bytes_of_room.restype = Size
    return library


def _share_openmp() -> None:
    """Let the kernels find the OpenMP that torch has loaded, under whatever name its wheel has for it."""
    for line in MAPS.read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(OPENMP):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
    raise OSError("torch has loaded no OpenMP")


def lies_as(x: Tensor, *shape: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a kernel, which is told an address and no more, finds this there."""
    return x.shape == shape and x.dtype == dtype and x.is_contiguous()


def empty_huge(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory in large pages, where the system gives any: what is read once a step looks up fewer addresses."""
    memory = torch.empty(shape, dtype=dtype)
    first = -(-memory.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (memory.data_ptr() + memory.nbytes - first) // HUGE_PAGE * HUGE_PAGE
    if size > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(Address(first), ctypes.c_size_t(size), ctypes.c_int(MADV_HUGEPAGE))  # advice: it may be refused
    return memory
