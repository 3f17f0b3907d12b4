"""From files to one rank's weights: everything is checked first, then only what the rank holds is read.

    find files -> headers -> names and shapes against the config -> the rank's pieces -> read, cut, packed in parallel

How files spell tensors: dialects.py. How tensors lie in files: tensor_files.py.

A rank asks its files for no byte that it does not hold. Rows of a matrix are one read. The columns that tensor
parallelism cuts out of attention's output projection are a short read per row, for every rank anew; what two ranks of
a node both touch comes from its page cache.

O, I: features out and in.  D: model width.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.comm import split_rows
from model.config import MixtralConfig
from model.dialects import Matrix, Stored, check_tensors, find_dialect, locate
from model.errors import CheckpointError
from model.layers import Linear
from model.shard import Shard
from model.tensor_files import TensorFile, TensorInfo, open_file, shortened, weight_files
from model.weights import BlockWeights, ExpertWeights, MixtralWeights

# Enough to keep a network disk busy; each holds one matrix beside what is already loaded.
READERS = 4

Progress = Callable[[int, int], None]


def load_weights(
    directory: Path,
    config: MixtralConfig,
    shard: Shard,
    *,
    dtype: torch.dtype,
    device: torch.device,
    check_finite: bool = False,
    progress: Progress | None = None,
) -> MixtralWeights:
    """`progress` hears of bytes read and bytes in total, in the checkpoint's precision, from this thread.

    With `check_finite` a weight that is NaN or infinite is refused; it costs another pass over all of them.
    """
    # Refuses an impossible layout before any file is opened.
    queries, keys = (scaled(heads, config.head_dim) for heads in config.head_slices(shard))
    vocabulary = split_rows(config.vocab_size, shard.tensor_size)
    first_token = sum(vocabulary[: shard.tensor_rank])
    tokens = range(first_token, first_token + vocabulary[shard.tensor_rank])
    with Checkpoint(directory, config) as checkpoint, ThreadPoolExecutor(READERS) as pool:
        loader = Loader(checkpoint, pool, dtype, device, check_finite=check_finite)
        experts = [shard.experts(layer, config.num_local_experts) for layer in range(config.num_hidden_layers)]
        blocks = [loader.block(layer, queries, keys, held) for layer, held in enumerate(experts)]
        embedding = loader.tensor(Piece(Matrix("embedding"), rows=tokens))
        norm = loader.tensor(Piece(Matrix("norm")))
        head = loader.linear(head_piece(config, tokens)) if config.has_head else None
        bias = loader.tensor(Piece(Matrix("head_bias"))) if config.has_head_bias else None
        loader.wait(progress)
        return MixtralWeights(
            first_token,
            embedding.result(),
            tuple(block() for block in blocks),
            norm.result(),
            None if head is None else head.result(),
            None if bias is None else bias.result(),
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows and columns of a matrix, as the model sees it; None: all."""

    matrix: Matrix
    rows: range | None = None
    columns: range | None = None


def head_piece(config: MixtralConfig, tokens: range) -> Piece:
    """A language model's head is cut like its vocabulary, a classifier's lies whole on every rank."""
    if config.is_language_model:
        return Piece(Matrix("embedding" if config.tie_word_embeddings else "head"), rows=tokens)
    return Piece(Matrix("head"))


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
        """A matrix in the model's own layout, in the file's precision."""
        stored, rows, columns = self._where(piece)
        matrix = self._holder[stored.name].read(stored.name, shifted(rows, stored.first_row), columns)
        if stored.turned:
            matrix = matrix.T.contiguous()
        if self.dialect.interleaved and piece.matrix.part in ("q", "k"):
            matrix = halves_from_pairs(matrix, self._config.head_dim)
        return matrix.flatten() if len(stored.tensor_shape) == 1 else matrix

    def bytes_of(self, piece: Piece) -> int:
        _, rows, columns = self._where(piece)
        return len(rows) * len(columns) * self.info_of(piece.matrix)[1].dtype.itemsize

    def info_of(self, matrix: Matrix) -> tuple[str, TensorInfo]:
        """The name and the place of the tensor that a matrix is, or is part of."""
        name = locate(self.dialect, self._config, matrix).name
        return name, self._holder[name].infos[name]

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


class Loader:
    """Pieces on their way from files to where they multiply, a few at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        pool: ThreadPoolExecutor,
        dtype: torch.dtype,
        device: torch.device,
        *,
        check_finite: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._pool = pool
        self._dtype = dtype
        self._device = device
        self._check_finite = check_finite
        self._bytes: dict[Future[Any], int] = {}

    def tensor(self, piece: Piece) -> Future[Tensor]:
        future = self._pool.submit(self._read, (piece,))
        self._bytes[future] = self._checkpoint.bytes_of(piece)
        return future

    def linear(self, *pieces: Piece) -> Future[Linear]:
        """One map from several matrices with the same input, one below the other."""
        future = self._pool.submit(lambda: Linear(self._read(pieces)))
        self._bytes[future] = sum(map(self._checkpoint.bytes_of, pieces))
        return future

    def block(self, layer: int, queries: range, keys: range, experts: tuple[int, ...]) -> Callable[[], BlockWeights]:
        """What to call for the block once everything has been read. Queries and keys: rows of their projections."""
        attention_norm = self.tensor(Piece(Matrix("attention_norm", layer)))
        qkv = self.linear(
            Piece(Matrix("q", layer), rows=queries),
            Piece(Matrix("k", layer), rows=keys),
            Piece(Matrix("v", layer), rows=keys),
        )
        output = self.linear(Piece(Matrix("o", layer), columns=queries))
        moe_norm = self.tensor(Piece(Matrix("moe_norm", layer)))
        router = self.tensor(Piece(Matrix("router", layer)))
        slots = [
            (
                self.linear(Piece(Matrix("gate", layer, expert)), Piece(Matrix("up", layer, expert))),
                self.linear(Piece(Matrix("down", layer, expert))),
            )
            for expert in experts
        ]
        return lambda: BlockWeights(
            attention_norm.result(),
            qkv.result(),
            output.result(),
            moe_norm.result(),
            router.result(),
            tuple(ExpertWeights(gate_up.result(), down.result()) for gate_up, down in slots),
        )

    def wait(self, progress: Progress | None) -> None:
        """Until all is read, or something could not be: then nothing more is begun."""
        done, total = 0, sum(self._bytes.values())
        try:
            for future in as_completed(self._bytes):
                future.result()
                done += self._bytes[future]
                if progress is not None:
                    progress(done, total)
        except BaseException:
            self._pool.shutdown(wait=True, cancel_futures=True)
            raise

    def _read(self, pieces: tuple[Piece, ...]) -> Tensor:
        parts = [self._checkpoint.read(piece).to(self._device, self._dtype) for piece in pieces]
        if self._check_finite:
            for piece, part in zip(pieces, parts, strict=True):
                self._refuse_infinite(piece, part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _refuse_infinite(self, piece: Piece, part: Tensor) -> None:
        if not all(extreme.isfinite() for extreme in part.aminmax()):  # of which both are NaN where one weight is
            name, info = self._checkpoint.info_of(piece.matrix)
            cast = "" if info.dtype == self._dtype else f", as saved or once cast to {self._dtype}"
            raise CheckpointError(f"{info.file}: {name} holds NaN or infinity{cast}")


def shifted(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by)


def scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def halves_from_pairs(matrix_OI: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from interleaved rotary pairs to halves: 0 1 2 3 4 5 -> 0 2 4 1 3 5."""
    _, width = matrix_OI.shape
    return matrix_OI.view(-1, head_dim // 2, 2, width).transpose(1, 2).reshape(-1, width)


def pairs_from_halves(matrix_OI: Tensor, head_dim: int) -> Tensor:
    """The way back."""
    _, width = matrix_OI.shape
    return matrix_OI.view(-1, 2, head_dim // 2, width).transpose(1, 2).reshape(-1, width)
