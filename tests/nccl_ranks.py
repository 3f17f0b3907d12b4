"""Ranks as threads of one process over tests/fake_nccl.c, compiled here: the transport as it is, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.transport.nccl import NcclComm
from cluster.transport.nccl_library import NcclLibrary

STREAM = 0x5EED  # whatever a stream is here: it has to arrive


def can_compile() -> bool:
    return shutil.which("gcc") is not None


@contextmanager
def fake_nccl() -> Iterator[ctypes.CDLL]:
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory) / "libnccl.so"
        source = Path(__file__).with_name("fake_nccl.c")
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-pthread", source, "-o", compiled], check=True)
        library = ctypes.CDLL(str(compiled))
        library.fake_stream.restype = ctypes.c_void_p
        yield library


def on_nccl_ranks(library: NcclLibrary, size: int, function: Callable[[NcclComm], Any]) -> list[Any]:
    """function(comm) on every rank; results in rank order."""
    unique_id = library.unique_id()
    with ThreadPoolExecutor(size) as threads:
        futures = [
            threads.submit(lambda r: function(NcclComm(library, unique_id, r, size, lambda device: STREAM)), rank)
            for rank in range(size)
        ]
        return [future.result(timeout=30) for future in futures]
