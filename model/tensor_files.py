"""Named tensors in files: what is there, checked before anything is read, and reading just some rows and columns.

    safetensors   8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | data
    torch         a zip archive, mapped into memory; unpickled with weights_only: nothing but tensors

Only the first is ever written.

Knows nothing of Mixtral: which tensors there should be is dialects.py's business.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.fields import read_json

MAX_HEADER_BYTES = 16 << 20  # Mixtral 8x22B's headers together take 0.2 MB
MAX_INDEX_BYTES = 64 << 20
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    # of quantised weights
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What torch.load raises on files that are cut short, damaged, or hold more than tensors.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFile(Protocol):
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, rows: range, columns: range, out: Tensor, width: int | None = None) -> None:
        """Some of a tensor, seen as a matrix: all dimensions but the last are rows; one dimension is one row.

        With `width` rows are so wide, whatever its dimensions. `out` is contiguous and has the shape of what is read,
        and the file's precision.
        """

    def close(self) -> None: ...


class SafetensorsFile:
    """Reads with positioned reads, not a memory map: threads read at once, and only what is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with refusing(path):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header, self._data_start, data_bytes = read_header(path, self._descriptor)
            self.infos: dict[str, TensorInfo] = {}
            self._offsets: dict[str, int] = {}
            for name, entry in header.items():
                self.infos[name], self._offsets[name] = parse_entry(path, name, entry, data_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def read(self, name: str, rows: range, columns: range, out: Tensor, width: int | None = None) -> None:
        info = self.infos[name]
        width = width or info.shape[-1]
        size = info.dtype.itemsize
        start = self._data_start + self._offsets[name]
        assert (out.shape, out.dtype) == ((len(rows), len(columns)), info.dtype)
        buffer: Any = out.view(torch.uint8).numpy()
        data = memoryview(buffer).cast("B")
        if len(columns) == width:
            self._fill(name, data, start + rows.start * width * size)
        else:
            stride = len(columns) * size
            for place, row in enumerate(rows):
                offset = start + (row * width + columns.start) * size
                self._fill(name, data[place * stride : (place + 1) * stride], offset)

    def _fill(self, name: str, data: memoryview, offset: int) -> None:
        while data:
            with refusing(self._path):
                count = os.preadv(self._descriptor, [data], offset)
            if not count:
                raise CheckpointError(f"{self._path}: {name} is cut short; the file changed while it was read")
            data, offset = data[count:], offset + count

    def close(self) -> None:
        os.close(self._descriptor)


class TorchFile:
    """A .pt or .pth file of named tensors."""

    def __init__(self, path: Path) -> None:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UNREADABLE as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"{path} is not a complete file of plain tensors: {reason}") from error
        if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise CheckpointError(f"{path} must hold a dictionary of tensors")
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                raise CheckpointError(f"{path}: {shortened(name)} is {tensor.dtype}; served are {spelled(FLOATS)}")
        self._tensors: dict[str, Tensor] = tensors
        self.infos = {name: TensorInfo(path, tuple(x.shape), x.dtype) for name, x in tensors.items()}

    def read(self, name: str, rows: range, columns: range, out: Tensor, width: int | None = None) -> None:
        matrix = self._tensors[name].reshape(-1, width or self._tensors[name].shape[-1])
        out.copy_(matrix[rows.start : rows.stop, columns.start : columns.stop])

    def close(self) -> None:
        self._tensors.clear()


def read_header(path: Path, descriptor: int) -> tuple[dict[str, Any], int, int]:
    """The header's object, where the data begins, and how many bytes of it there are."""
    with refusing(path):
        file_bytes = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if file_bytes < 8 or length > file_bytes - 8:
            raise CheckpointError(f"{path} is cut short: {file_bytes} bytes do not hold its header; download it again")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} announces a header of {length} bytes, which is no Mixtral's")
        text = os.pread(descriptor, length, 8)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length, file_bytes - 8 - length


def parse_entry(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[TensorInfo, int]:
    """One tensor's line of a header, believed only as far as the file bears it out."""
    try:
        dtype_name, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {shortened(name)} lacks dtype, shape or offsets") from error
    if not all(type(x) is int and 0 <= x < 1 << 50 for x in numbers) or len(shape) > 4:
        raise CheckpointError(f"{path}: {shortened(name)} has an impossible shape or offset")
    if dtype_name not in DTYPES:
        raise CheckpointError(
            f"{path}: {shortened(name)} is {shortened(str(dtype_name))}; served are {', '.join(DTYPES)}"
        )
    info = TensorInfo(path, tuple(shape), DTYPES[dtype_name])
    if end - start != math.prod(shape) * info.dtype.itemsize:
        raise CheckpointError(f"{path}: {shortened(name)} has {end - start} bytes, which is not what its shape needs")
    if end > data_bytes:
        raise CheckpointError(f"{path} is cut short at {shortened(name)}: download it again")
    return info, start


def write_safetensors(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[Tensor]) -> None:
    """A new file of these tensors, which are taken one by one, each written before the next is asked for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
    end = 0
    for name, info in infos.items():
        start, end = end, end + math.prod(info.shape) * info.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": info.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info, tensor in zip(infos.values(), tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
            data: Any = tensor.contiguous().view(torch.uint8).numpy()
            file.write(data)


def spelled(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(DTYPE_NAMES[dtype] for dtype in dtypes)


def shortened(name: str) -> str:
    """A name out of a file, fit for a message."""
    return ascii(name)[1:-1] if len(name) <= 100 else ascii(name[:100])[1:-1] + "..."


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """What the operating system says about a file, as ours."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def weight_files(directory: Path) -> list[Path]:
    """The files a checkpoint's weights lie in: Hugging Face's index or single file, else Mistral's consolidated."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        return indexed_files(index)
    if single.is_file():
        return [single]
    for pattern in ("consolidated*.safetensors", "consolidated*.pt", "consolidated*.pth"):
        if found := sorted(directory.glob(pattern)):
            return found
    if any(directory.glob("model-*.safetensors")):
        raise CheckpointError(f"{directory} has parts of a model but no {index.name}: finish the download")
    raise CheckpointError(
        f"{directory} holds no weights: model.safetensors, {index.name} with its parts, or consolidated files"
    )


def indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index, CheckpointError, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = set(map(str, weight_map.values()))
    for name in sorted(names):
        # Parts lie beside the index. Resolving would not do: download caches are made of links that lead elsewhere.
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} points to {shortened(name)}, which is not a safetensors file beside it")
    paths = [index.parent / name for name in sorted(names)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(f"{index} names {len(paths)} files and {missing[0]} is missing: finish the download")
    return paths


def open_file(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
