"""Texts with page tables, and the batches that compute their next tokens: what a scheduler does, for tests."""

from __future__ import annotations

import random

import torch

from model.batch import Batch, SequenceSpan, page_runs

CPU = torch.device("cpu")
PAGE = 4


class PagedTexts:
    """Page tables of some texts, and the batch that computes the next tokens of each."""

    def __init__(self, texts: list[list[int]], num_pages: int, rng: random.Random, device: torch.device = CPU) -> None:
        self._device = device
        self.texts = texts
        self.done = [0] * len(texts)
        self.pages: list[list[int]] = [[] for _ in texts]
        free = list(range(num_pages))
        if rng.random() < 0.5:
            rng.shuffle(free)
        self.free = free

    def step(self, lengths: list[int]) -> Batch:
        spans, ids, positions, slots = [], [], [], []
        for seq, length in enumerate(lengths):
            if not length:
                continue
            start = self.done[seq]
            self.done[seq] += length
            while len(self.pages[seq]) * PAGE < self.done[seq]:
                self.pages[seq].append(self.free.pop(0))
            spans.append(SequenceSpan(len(ids), length, self.done[seq], page_runs(self.pages[seq])))
            for position in range(start, self.done[seq]):
                ids.append(self.texts[seq][position])
                positions.append(position)
                slots.append(self.pages[seq][position // PAGE] * PAGE + position % PAGE)
        tensors = [torch.tensor(x, dtype=torch.int64, device=self._device) for x in (ids, positions, slots)]
        rows = torch.arange(len(ids), device=self._device)
        return Batch(*tensors, tuple(spans), logits_rows=rows)
