"""Broken, cut, damaged and hostile files are named, not crashed on, not run, and not read for long."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import CheckpointError
from tests.checkpoints import (
    QUERY,
    assert_same,
    flattened,
    load,
    stacked,
    write_index,
)
from tests.tiny import CONFIG, weights, write_checkpoint


def test_files_split_by_an_index_give_the_same_weights(tmp_path: Path) -> None:
    expected = load(write_checkpoint(tmp_path / "a"))
    directory = write_checkpoint(tmp_path / "b")
    write_index(directory, 3)
    assert_same(load(directory), expected)


@pytest.mark.parametrize("keep", [0, 4, 2000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 3}', "a lacks dtype"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "impossible shape"),
        (b'{"a": {"dtype": "F32", "shape": [1e3], "data_offsets": [0, 4]}}', "impossible shape"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', "not what its shape needs"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "cut short at a"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)
    with pytest.raises(CheckpointError, match="header of 1073741824 bytes"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", ".."])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: str) -> None:
    index = write_index(write_checkpoint(tmp_path), 2)
    index.write_text(json.dumps({"weight_map": {QUERY: name}}))
    with pytest.raises(CheckpointError, match="which is not a safetensors file beside it"):
        load(tmp_path)


def test_an_unfinished_download_says_which_file_is_missing(tmp_path: Path) -> None:
    index = write_index(write_checkpoint(tmp_path), 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 3 files and model-00002-of-00003\.safetensors is missing"):
        load(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json: finish the download"):
        load(tmp_path)


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK nonsense", [1, 2], {"a": "text"}, {"a": torch.ones(1, dtype=torch.int8)}]
)
def test_a_torch_file_of_anything_but_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    path = directory / "consolidated.00.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        load(directory)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, keep: float) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    path = directory / "consolidated.00.pth"
    torch.save(stacked(weights(CONFIG)), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="not a complete file of plain tensors"):
        load(directory)


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


def test_a_torch_file_cannot_run_code(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    torch.save({"a": Trap(tmp_path / "sprung")}, directory / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="not a complete file of plain tensors"):
        load(directory)
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_header_is_refused_or_means_the_same(tmp_path: Path) -> None:
    """Bytes of the header changed at random: no other error, no other shapes, no endless read."""
    directory = write_checkpoint(tmp_path, num_hidden_layers=1, num_local_experts=2)
    path = directory / "model.safetensors"
    expected = [x.shape for x in flattened(load(directory))]
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header_end)] = rng.choice([*b'0123456789"{}[],:', rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            found = load(directory)
        except CheckpointError:
            continue
        assert [x.shape for x in flattened(found)] == expected


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path)
    monkeypatch.setattr("model.tensor_files.os.preadv", lambda *arguments: 0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* is cut short; the file changed"):
        load(directory)


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path)

    def failing(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("model.tensor_files.os.preadv", failing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Input/output error"):
        load(directory)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_files_is_refused(tmp_path: Path, content: str) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(tmp_path)
