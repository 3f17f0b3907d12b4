"""From files to one rank's weights: everything is checked first, then only what the rank holds is read.

    find files -> headers -> names and shapes against the config -> the rank's pieces -> read, cut, packed in parallel

    file --read--> a reader's block, pinned where a GPU fetches from it --> [quantise] --> its rows of the final tensor

What lies in the files: checkpoint_files.py. A matrix on its way is never anywhere whole but where it stays, or in the
one buffer from which a CPU's layouts are packed.

A rank asks its files for no byte that it does not hold. Rows of a matrix are one read. Columns (of attention's output
projection under tensor parallelism, of down where experts are sliced) are a short read per row, for every rank anew;
what two ranks of a node both touch is read from disk once and comes from its page cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.checkpoint_files import Checkpoint, Piece
from model.comm import split_rows
from model.config import MixtralConfig
from model.dialects import Matrix
from model.errors import CheckpointError
from model.layers import Linear, can_pack, make_linear
from model.modes import Mode, group_size
from model.quantization import QuantizedWeight, below_each_other, quantize
from model.quantized_linear import make_quantized_linear
from model.quantized_slices import loading_mode
from model.shard import Shard
from model.weights import BlockWeights, ExpertWeights, MixtralWeights

# Enough to keep a network disk busy: while one waits for a GPU to fetch its block, the others read.
READERS = 4
# Numbers of a block. What is on its way takes a few times as many bytes for each reader, however large a matrix is.
# Larger ones would not be read faster; what a GPU fetches at once should not be too small.
CPU_BLOCK = 1 << 18
BLOCK = 1 << 22

Progress = Callable[[int, int], None]
Read = TypeVar("Read")


def load_weights(
    directory: Path,
    config: MixtralConfig,
    shard: Shard,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Mode | None = None,
    check_finite: bool = False,
    progress: Progress | None = None,
) -> MixtralWeights:
    """`progress` hears of bytes read and bytes in total, in the checkpoint's precision, from this thread.

    With `quantization` the projections of attention and experts are quantised as they arrive; what was saved quantised
    stays so without. With `check_finite` a weight that is NaN or infinite is refused; it costs another pass.
    """
    # Refuses an impossible layout before any file is opened.
    mode = loading_mode(config, shard, quantization)
    queries, keys = (scaled(heads, config.head_dim) for heads in config.head_slices(shard))
    ffn = shard.ffn_rows(config.intermediate_size)
    vocabulary = split_rows(config.vocab_size, shard.tensor_size)
    first_token = sum(vocabulary[: shard.tensor_rank])
    tokens = range(first_token, first_token + vocabulary[shard.tensor_rank])
    with Checkpoint(directory, config) as checkpoint, ThreadPoolExecutor(READERS) as pool:
        loader = Loader(checkpoint, pool, dtype, device, mode, check_finite=check_finite)
        experts = [shard.experts(layer, config.num_local_experts) for layer in range(config.num_hidden_layers)]
        blocks = [loader.block(layer, queries, keys, ffn, held) for layer, held in enumerate(experts)]
        embedding = loader.matrix(Piece(Matrix("embedding"), rows=tokens))
        norm = loader.vector(Piece(Matrix("norm")))
        head = loader.linear(head_piece(config, tokens)) if config.has_head else None
        bias = loader.vector(Piece(Matrix("head_bias"))) if config.has_head_bias else None
        loader.wait(progress)
        return MixtralWeights(
            first_token,
            embedding.result(),
            tuple(block() for block in blocks),
            norm.result(),
            None if head is None else head.result(),
            None if bias is None else bias.result(),
        )


def load_experts(
    directory: Path,
    config: MixtralConfig,
    shard: Shard,
    wanted: Iterable[tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Mode | None = None,
) -> dict[tuple[int, int], ExpertWeights]:
    """Experts by layer and number, cut as the shard says: what a rank reads when experts move to it."""
    mode = loading_mode(config, shard, quantization)
    ffn = shard.ffn_rows(config.intermediate_size)
    with Checkpoint(directory, config) as checkpoint, ThreadPoolExecutor(READERS) as pool:
        loader = Loader(checkpoint, pool, dtype, device, mode, check_finite=False)
        experts = {key: loader.expert(*key, ffn) for key in wanted}
        loader.wait(None)
        return {key: expert() for key, expert in experts.items()}


def head_piece(config: MixtralConfig, tokens: range) -> Piece:
    """A language model's head is cut like its vocabulary, a classifier's lies whole on every rank."""
    if config.is_language_model:
        return Piece(Matrix("embedding" if config.tie_word_embeddings else "head"), rows=tokens)
    return Piece(Matrix("head"))


class Loader:
    """Pieces on their way from files to where they multiply, a few at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        pool: ThreadPoolExecutor,
        dtype: torch.dtype,
        device: torch.device,
        mode: Mode | None,  # what the projections of attention and experts become; None: they stay as saved
        *,
        check_finite: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._pool = pool
        self._dtype = dtype
        self._device = device
        self._mode = mode
        self._check_finite = check_finite
        self._matrices = Buffers(pinned=False)
        self._blocks = Buffers(pinned=device.type == "cuda")
        self._block_size = CPU_BLOCK if device.type == "cpu" else BLOCK
        self._bytes: dict[Future[Any], int] = {}

    def vector(self, piece: Piece) -> Future[Tensor]:
        return self._begin((piece,), lambda: self._read(piece).flatten())

    def matrix(self, piece: Piece) -> Future[Tensor]:
        return self._begin((piece,), lambda: self._read(piece))

    def linear(self, *pieces: Piece) -> Future[Linear]:
        """One map from several matrices with the same input, one below the other."""
        if all(self._checkpoint.is_quantized(piece.matrix) for piece in pieces):
            return self._begin(pieces, lambda: self._read_quantized(pieces))
        return self._begin(pieces, lambda: self._read_linear(pieces))

    def projection(self, *pieces: Piece) -> Future[Linear]:
        """The same for attention and experts, whose weights are quantised if any are."""
        mode, columns = self._mode, pieces[0].columns
        if mode is None:
            return self.linear(*pieces)
        if group_size(mode) is None:
            # The scale of a row is made of all its columns, so that every layout gets the same.
            pieces = tuple(replace(piece, columns=None) for piece in pieces)
        return self._begin(pieces, lambda: self._quantize(pieces, mode, columns))

    def _begin(self, pieces: tuple[Piece, ...], read: Callable[[], Read]) -> Future[Read]:
        future = self._pool.submit(read)
        self._bytes[future] = sum(map(self._checkpoint.bytes_of, pieces))
        return future

    def block(
        self, layer: int, queries: range, keys: range, ffn: range, experts: tuple[int, ...]
    ) -> Callable[[], BlockWeights]:
        """What to call for the block once everything has been read. Queries, keys, ffn: rows of their projections."""
        attention_norm = self.vector(Piece(Matrix("attention_norm", layer)))
        qkv = self.projection(
            Piece(Matrix("q", layer), rows=queries),
            Piece(Matrix("k", layer), rows=keys),
            Piece(Matrix("v", layer), rows=keys),
        )
        output = self.projection(Piece(Matrix("o", layer), columns=queries))
        moe_norm = self.vector(Piece(Matrix("moe_norm", layer)))
        router = self.matrix(Piece(Matrix("router", layer)))
        slots = [self.expert(layer, expert, ffn) for expert in experts]
        return lambda: BlockWeights(
            attention_norm.result(),
            qkv.result(),
            output.result(),
            moe_norm.result(),
            router.result(),
            tuple(expert() for expert in slots),
        )

    def expert(self, layer: int, expert: int, ffn: range) -> Callable[[], ExpertWeights]:
        gate_up = self.projection(
            Piece(Matrix("gate", layer, expert), rows=ffn), Piece(Matrix("up", layer, expert), rows=ffn)
        )
        down = self.projection(Piece(Matrix("down", layer, expert), columns=ffn))
        return lambda: ExpertWeights(gate_up.result(), down.result())

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

    def _read(self, piece: Piece) -> Tensor:
        out = torch.empty(self._checkpoint.shape_of(piece), dtype=self._dtype, device=self._device)
        self._fill(out, piece)
        return out

    def _read_linear(self, pieces: tuple[Piece, ...]) -> Linear:
        shapes = [self._checkpoint.shape_of(piece) for piece in pieces]
        heights, (_, width) = [height for height, _ in shapes], shapes[0]
        on_cpu = self._device.type == "cpu"
        take = self._matrices.take if on_cpu else partial(torch.empty, device=self._device)
        weight = take(sum(heights), width, dtype=self._dtype)
        for piece, part in zip(pieces, torch.split(weight, heights), strict=True):
            self._fill(part, piece)
        # Packing leaves the buffer to the next matrix; a plain weight would lie in it.
        return make_linear(weight.clone() if on_cpu and not can_pack(weight) else weight)

    def _read_quantized(self, pieces: tuple[Piece, ...]) -> Linear:
        read = partial(self._checkpoint.read_quantized, pinned=self._device.type == "cuda")
        weight = self._together(pieces, lambda block: read(block).to(self._device))
        if self._check_finite and not weight.is_finite():
            name, info = self._checkpoint.info_of(pieces[0].matrix)
            raise CheckpointError(f"{info.file}: {name}, or what belongs to it, holds NaN or infinity")
        return make_quantized_linear(weight, self._dtype)

    def _quantize(self, pieces: tuple[Piece, ...], mode: Mode, columns: range | None) -> Linear:
        """From the checkpoint's own precision, whatever the model's; the columns are cut out afterwards."""

        def quantized(block: Piece) -> QuantizedWeight:
            plain = self._read_block(block)
            self._refuse_infinite(plain, block)
            weight = quantize(plain, mode)
            return weight if columns is None or columns == block.columns else weight.columns(columns)

        return make_quantized_linear(self._together(pieces, quantized), self._dtype)

    def _together(self, pieces: tuple[Piece, ...], read: Callable[[Piece], QuantizedWeight]) -> QuantizedWeight:
        """The pieces below each other, a block at a time."""
        blocks = (block for piece in pieces for block in self._checkpoint.blocks(piece, self._block_size))
        return below_each_other(map(read, blocks), sum(self._checkpoint.shape_of(piece)[0] for piece in pieces))

    def _fill(self, out: Tensor, piece: Piece) -> None:
        if self._device.type == "cpu" and self._checkpoint.lies_as(piece, out.dtype):
            self._checkpoint.read_into(out, piece)
        else:
            row = 0
            for block in self._checkpoint.blocks(piece, self._block_size):
                rows = self._read_block(block)
                out[row : row + len(rows)] = rows
                row += len(rows)
        self._refuse_infinite(out, piece)

    def _read_block(self, block: Piece) -> Tensor:
        """On the device, in the file's precision, until this thread reads another."""
        here = self._blocks.take(*self._checkpoint.shape_of(block), self._checkpoint.dtype_of(block.matrix))
        self._checkpoint.read_into(here, block)
        return here.to(self._device)

    def _refuse_infinite(self, weight: Tensor, piece: Piece) -> None:
        # An extreme is NaN as soon as one weight is.
        if self._check_finite and not all(extreme.isfinite() for extreme in weight.aminmax()):
            name, info = self._checkpoint.info_of(piece.matrix)
            cast = "" if info.dtype == weight.dtype else f", as saved or once cast to {weight.dtype}"
            raise CheckpointError(f"{info.file}: {name} holds NaN or infinity{cast}")


class Buffers:
    """For each reading thread one piece of memory, used again for whatever goes through it.

    New memory for each would cost as much as reading it, and an allocator that keeps what was freed for the next ends
    up with a quarter more than there is. Pinned, a GPU fetches from it by itself.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._mine = threading.local()

    def take(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised, and this thread's until it takes another."""
        size = height * width * dtype.itemsize
        buffer = getattr(self._mine, "buffer", None)
        if buffer is None or len(buffer) < size:
            self._mine.buffer = buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return buffer[:size].view(dtype).view(height, width)


def scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
