"""Our Mixtral against transformers' on random configs, whole and in every way of cutting a text into steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model.batch import Batch, SequenceSpan, page_runs
from model.checkpoint import load_weights
from model.config import load_config
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.shard import Shard
from tests.tiny import write_checkpoint

CPU = torch.device("cpu")
PAGE = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Sequences:
    """Page tables of some texts, and the batch that computes the next tokens of each."""

    def __init__(self, texts: list[list[int]], num_pages: int, rng: random.Random) -> None:
        self.texts = texts
        self.done = [0] * len(texts)
        self.pages: list[list[int]] = [[] for _ in texts]
        free = list(range(num_pages))
        if rng.random() < 0.5:
            rng.shuffle(free)
        self.free = free

    def step(self, lengths: list[int]) -> Batch:
        spans, ids, positions, slots, last = [], [], [], [], []
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
            last += range(len(ids) - length, len(ids))
        tensors = [torch.tensor(x, dtype=torch.int64) for x in (ids, positions, slots, last)]
        return Batch(tensors[0], tensors[1], tensors[2], tuple(spans), tensors[3])


def random_config(rng: random.Random) -> dict[str, Any]:
    kv_heads = rng.randint(1, 8)
    heads = kv_heads * rng.randint(1, 4 if kv_heads < 4 else 2)
    experts = rng.randint(3, 16)
    head_dim = 2 * rng.randint(3, 14)
    return {
        "hidden_size": 8 * rng.randint(3, 9),
        "head_dim": head_dim,
        "intermediate_size": 4 * rng.randint(5, 20),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_local_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(4, experts)),
        "vocab_size": 384 + rng.randint(0, 5),
        "rope_parameters": random_rope(rng, head_dim),
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "sliding_window": rng.choice([None, None, 3, 8, 17]),
        "tie_word_embeddings": rng.random() < 0.3,
    }


def random_rope(rng: random.Random, head_dim: int) -> dict[str, Any]:
    scaled = {"factor": 4.0, "original_max_position_embeddings": 16}
    factors = {name: [rng.uniform(1, 4) for _ in range(head_dim // 2)] for name in ("short_factor", "long_factor")}
    kinds = [
        {},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn"} | scaled,
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | scaled,
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 2} | factors,
    ]
    return {"rope_type": "default"} | rng.choice(kinds) | {"rope_theta": rng.choice([1e4, 1e6])}


def expected_logits(directory: Path, texts: list[list[int]]) -> list[torch.Tensor]:
    model = transformers.MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([text])).logits[0] for text in texts]


@pytest.mark.parametrize("seed", range(44))
def test_transformers_agrees_however_texts_are_cut_into_steps(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    directory = write_checkpoint(tmp_path, seed=seed, **random_config(rng))
    config = load_config(directory)
    weights = load_weights(directory, config, Shard(), dtype=torch.float32, device=CPU)
    texts = [[rng.randrange(384) for _ in range(rng.randint(3, 40))] for _ in range(3)]
    model = Mixtral(config, weights)
    kv = KVCache(config, Shard(), num_pages=40, page_size=PAGE, dtype=torch.float32, device=CPU)
    exchange = OneRank(config.num_local_experts)
    sequences = Sequences(texts, 40, rng)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(done < len(text) for done, text in zip(sequences.done, texts, strict=True)):
        left = [len(text) - done for done, text in zip(sequences.done, texts, strict=True)]
        lengths = [min(n, rng.choice([0, 1, 1, 5, n])) for n in left]
        logits = model.logits(model.forward(sequences.step(lengths), kv, exchange))
        for seq, rows in enumerate(logits.split(lengths)):
            found[seq].append(rows)
    for seq, expected in enumerate(expected_logits(directory, texts)):
        error = (torch.cat(found[seq]) - expected).abs().max() / expected.abs().max()
        assert error < 2e-5, f"seed {seed}, sequence {seq}"
