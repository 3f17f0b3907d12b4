"""Muon: momentum whose matrices are made orthogonal before they are applied (Keller Jordan and others, 2024).

For the matrices inside the network. Every direction of a matrix gets a step of the same size, so that rare but
useful directions, such as those that copy a name from the prompt, are not drowned by frequent ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# A quintic whose repeated application brings singular values from (0, 1] near 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
ADAM_SIZE = 0.2  # root mean square of a typical Adam step: Adam's learning rates then serve here as well


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all about 1; the last two dimensions are the matrix."""
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    # The iteration corrects its own rounding, and bfloat16 takes a third of the time.
    x: Tensor = (matrix.mT if tall else matrix).bfloat16()
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon:
    """One momentum per matrix; stacks of matrices, such as all experts of a layer, are treated one by one."""

    def __init__(self, matrices: Iterable[Tensor], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.momenta = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for matrix, momentum in self.momenta:
            assert matrix.grad is not None, "step() comes after backward()"
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            direction = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
            matrix.mul_(1 - rate * self.weight_decay)
            matrix.add_(direction, alpha=-rate * ADAM_SIZE * max(matrix.shape[-2:]) ** 0.5)
