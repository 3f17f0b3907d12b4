"""One block's experts by the compiled kernels, beside the packed products of torch, in one run.

    python -m tests.bench.native_speed [--threads 2]

bfloat16, 8 experts of which 2 work per token, sizes of the middle model. Several blocks by turns, so that no cache
holds the weights; the fastest of the turns of each side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from model.layers import PackedLinear
from model.moe import run_experts
from model.native.linear import NativeExperts, NativeLinear
from model.weights import ExpertWeights

D, F, E, K = 1024, 3584, 8, 2
BLOCKS = 3
TURNS = 9


class Block:
    def __init__(self) -> None:
        gate_up = [torch.randn(2 * F, D).bfloat16() / 32 for _ in range(E)]
        down = [torch.randn(D, F).bfloat16() / 60 for _ in range(E)]
        packed = [ExpertWeights(PackedLinear(g), PackedLinear(d)) for g, d in zip(gate_up, down, strict=True)]
        native = NativeExperts([NativeLinear(g) for g in gate_up], [NativeLinear(d) for d in down])
        self.sides = {"packed": partial(run_experts, experts=packed), "native": native}


def rows_of(tokens: int) -> list[int]:
    chosen = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    return torch.bincount(chosen.flatten(), minlength=E).tolist()


def seconds(blocks: Sequence[Block], side: str, x_ND: Tensor, rows: list[int]) -> float:
    start = perf_counter()
    for block in blocks:
        block.sides[side](x_ND, rows)
    return (perf_counter() - start) / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    blocks = [Block() for _ in range(BLOCKS)]
    print("tokens   packed ms   native ms   ratio   native: GB/s read   GFLOP/s")
    for tokens in (1, 4, 8, 32, 128, 1024):
        rows = rows_of(tokens)
        x_ND = torch.randn(sum(rows), D).bfloat16()
        turns = [{side: seconds(blocks, side, x_ND, rows) for side in ("packed", "native")} for _ in range(TURNS)]
        packed, native = (min(turn[side] for turn in turns) for side in ("packed", "native"))
        read = sum(count > 0 for count in rows) * 3 * D * F * 2 / native / 1e9
        done = sum(rows) * 6 * D * F / native / 1e9
        row = f"{tokens:>6}{1e3 * packed:>12.2f}{1e3 * native:>12.2f}{packed / native:>8.2f}{read:>20.0f}{done:>10.0f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
