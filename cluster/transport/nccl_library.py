"""libnccl's dozen functions that the transport calls: their types, and every return code checked.

torch's own NCCL groups are reported to hang when a CUDA graph that captured them is replayed. These calls put their
work on the stream they are given and do nothing else, so whatever captures the stream has captured them. Knows neither
torch nor what ranks exchange.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

UNIQUE_ID_BYTES = 128
SUM = 0  # ncclRedOp_t

Communicator = int  # an ncclComm_t, by its address


class UniqueId(ctypes.Structure):
    """Passed by value."""

    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
# Communicators and streams are pointers, types and operators are enumerations.
_ARGUMENTS: dict[str, list[type]] = {
    "ncclGetVersion": [ctypes.POINTER(_INT)],
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRank": [ctypes.POINTER(_POINTER), _INT, UniqueId, _INT],
    "ncclCommAbort": [_POINTER],
    "ncclAllReduce": [_POINTER, _POINTER, _COUNT, _INT, _INT, _POINTER, _POINTER],
    "ncclReduceScatter": [_POINTER, _POINTER, _COUNT, _INT, _INT, _POINTER, _POINTER],
    "ncclAllGather": [_POINTER, _POINTER, _COUNT, _INT, _POINTER, _POINTER],
    "ncclBroadcast": [_POINTER, _POINTER, _COUNT, _INT, _INT, _POINTER, _POINTER],
    "ncclSend": [_POINTER, _COUNT, _INT, _INT, _POINTER, _POINTER],
    "ncclRecv": [_POINTER, _COUNT, _INT, _INT, _POINTER, _POINTER],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
}


class NcclError(ConnectionError):
    """NCCL could not do something. A ConnectionError: mostly because of another rank."""


class NcclLibrary:
    """Memory and streams are addresses. Counts are of elements; a collective's own rank's, where ranks differ."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
            self._functions[name] = function
        self._error_string, self._last_error = library.ncclGetErrorString, library.ncclGetLastError
        self._error_string.argtypes, self._error_string.restype = [_INT], ctypes.c_char_p
        self._last_error.argtypes, self._last_error.restype = [_POINTER], ctypes.c_char_p
        number = ctypes.c_int()
        self._functions["ncclGetVersion"](ctypes.byref(number))
        self.version = f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"

    def unique_id(self) -> bytes:
        """A new group's name, which all of its ranks need."""
        unique_id = UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(unique_id))
        return bytes(unique_id)

    def connect(self, unique_id: bytes, size: int, rank: int) -> Communicator:
        """On the current device. Blocks until all ranks are here."""
        communicator = ctypes.c_void_p()
        named = UniqueId.from_buffer_copy(unique_id)
        self._call("ncclCommInitRank", ctypes.byref(communicator), size, named, rank)
        assert communicator.value is not None
        return communicator.value

    def abort(self, communicator: Communicator) -> None:
        """End what hangs, and free the communicator once the graphs that captured it are gone. Blocks until then."""
        self._call("ncclCommAbort", communicator)

    def all_reduce(
        self, source: int, target: int, count: int, dtype: int, communicator: Communicator, stream: int
    ) -> None:
        self._call("ncclAllReduce", source, target, count, dtype, SUM, communicator, stream)

    def reduce_scatter(
        self, source: int, target: int, count: int, dtype: int, communicator: Communicator, stream: int
    ) -> None:
        self._call("ncclReduceScatter", source, target, count, dtype, SUM, communicator, stream)

    def all_gather(
        self, source: int, target: int, count: int, dtype: int, communicator: Communicator, stream: int
    ) -> None:
        self._call("ncclAllGather", source, target, count, dtype, communicator, stream)

    def broadcast(
        self, memory: int, count: int, dtype: int, root: int, communicator: Communicator, stream: int
    ) -> None:
        """In place."""
        self._call("ncclBroadcast", memory, memory, count, dtype, root, communicator, stream)

    def send(self, source: int, count: int, dtype: int, to: int, communicator: Communicator, stream: int) -> None:
        self._call("ncclSend", source, count, dtype, to, communicator, stream)

    def receive(
        self, target: int, count: int, dtype: int, sender: int, communicator: Communicator, stream: int
    ) -> None:
        self._call("ncclRecv", target, count, dtype, sender, communicator, stream)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is called within begins when this ends, and at once: ranks that send to each other would else wait."""
        self._call("ncclGroupStart")
        try:
            yield
        except BaseException:
            self._functions["ncclGroupEnd"]()  # it fails too; the first failure says why
            raise
        self._call("ncclGroupEnd")

    def _call(self, name: str, *arguments: object) -> None:
        code = self._functions[name](*arguments)
        if code:
            what, why = self._error_string(code).decode(), (self._last_error(None) or b"").decode().strip()
            raise NcclError(f"NCCL {self.version}, {name}: {what}{': ' if why else ''}{why}")


def load_nccl() -> NcclLibrary:
    """The one that torch has loaded, or that the system has."""
    try:
        return NcclLibrary(ctypes.CDLL("libnccl.so.2"))
    except OSError as error:
        raise NcclError(f"NCCL is not there ({error}): install torch for CUDA, which brings it") from None
