"""The whole model on the GPU's backend, run in Triton's interpreter, against the CPU's."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

from model.config import MixtralConfig
from model.cpu_backend import CpuBackend
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.modes import Mode
from model.moe import Routing
from model.shard import Shard
from tests.paged_texts import PAGE, PagedTexts
from tests.random_model import RandomModel
from tests.tiny import CONFIG

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.triton_backend import TritonBackend

CPU = torch.device("cpu")


def random_config(rng: random.Random) -> MixtralConfig:
    kv_heads = rng.randint(1, 3)
    experts = rng.randint(3, 8)
    raw: dict[str, Any] = {
        "hidden_size": 8 * rng.randint(3, 9),
        "head_dim": 2 * rng.randint(3, 14),
        "intermediate_size": 4 * rng.randint(5, 20),
        "num_hidden_layers": rng.randint(1, 2),
        "num_attention_heads": kv_heads * rng.randint(1, 4),
        "num_key_value_heads": kv_heads,
        "num_local_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(3, experts)),
        "sliding_window": rng.choice([None, None, 3, 8, 17]),
    }
    return MixtralConfig.from_dict(CONFIG | raw, "config.json")


def memory(config: MixtralConfig, pages: int) -> KVCache:
    return KVCache(config, Shard(), num_pages=pages, page_size=PAGE, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("seed", range(40 if os.environ.get("MIXTRAL_TEST_ALL") else 2))
def test_it_computes_what_the_cpu_does_however_texts_are_cut_into_steps(seed: int) -> None:
    rng = random.Random(seed)
    config = random_config(rng)
    weights = RandomModel(config, CPU, torch.float32, seed=seed).weights()
    backends = CpuBackend(config, torch.float32), TritonBackend(config, CPU, torch.float32)
    models = [(Mixtral(config, weights, backend=backend), memory(config, 40)) for backend in backends]
    texts = [[rng.randrange(384) for _ in range(rng.randint(3, 16))] for _ in range(3)]
    sequences = PagedTexts(texts, 40, rng)
    while any(done < len(text) for done, text in zip(sequences.done, texts, strict=True)):
        left = [len(text) - done for done, text in zip(sequences.done, texts, strict=True)]
        batch = sequences.step([min(n, rng.choice([0, 1, n, n])) for n in left])
        routings: list[list[Routing]] = [[], []]
        exchange = OneRank(config.num_local_experts)
        expected, found = (
            model.logits(model.forward(batch, kv, exchange, heard))
            for (model, kv), heard in zip(models, routings, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for cpu, device in zip(*routings, strict=True):
            assert torch.equal(cpu.expert_SK, device.expert_SK)
            torch.testing.assert_close(cpu.weight_SK, device.weight_SK, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["int4", "fp8"])
def test_quantised_models_are_the_cpus_too(mode: Mode) -> None:
    sizes = {"intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 3}
    config = MixtralConfig.from_dict(CONFIG | sizes, "config.json")
    weights = RandomModel(config, CPU, torch.float32, mode=mode).weights()
    batch = PagedTexts([[5, 6, 7], [8]], 40, random.Random(0)).step([3, 1])
    expected, found = (
        Mixtral(config, weights, backend=backend).forward(batch, memory(config, 40), OneRank(3))
        for backend in (CpuBackend(config, torch.float32), TritonBackend(config, CPU, torch.float32))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
