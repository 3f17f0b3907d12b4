"""What scores mean: probabilities of labels, vectors of length 1, and the best answer in a text. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.serving import Decoder


@dataclass(frozen=True, slots=True)
class Span:
    start: int  # characters of the context
    end: int
    score: float


def label_probabilities(scores: Sequence[float]) -> list[float]:
    """Of labels that exclude each other; of a single one, whether it holds."""
    return softmax(scores) if len(scores) > 1 else [1 / (1 + math.exp(-max(-500.0, scores[0])))]


def softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def unit_length(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)


def context_offsets(ids: Sequence[int], decoder: Decoder) -> list[tuple[int, int]]:
    """Where each token stands in its text: (first character, one behind its last)."""
    offsets = []
    at = 0
    for token in ids:
        before, at = at, at + len(decoder.push([token]))
        offsets.append((before, at))
    return offsets


def best_span(rows: Sequence[Sequence[float]], offsets: Sequence[tuple[int, int]], max_tokens: int) -> Span:
    """The most likely (start, end) of an answer, given (start score, end score) of each token of the context."""
    starts, ends = softmax([row[0] for row in rows]), softmax([row[1] for row in rows])
    candidates = (
        (starts[first] * ends[last], -first, -last)
        for first in range(len(rows))
        for last in range(first, min(first + max_tokens, len(rows)))
        if offsets[last][1] > offsets[first][0]  # tokens without text, as <s>, are no answer
    )
    score, first, last = max(candidates, default=(0.0, 0, 0))
    return Span(offsets[-first][0], offsets[-last][1], score)
