"""From a batch to sampled ids the host never waits for the device; torch itself says where it would."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from model.exchange import OneRank, SlotLoad
from model.kv_cache import KVCache
from model.logit_rules import History, LogitRules, apply_rules
from model.mixtral import Mixtral
from model.modes import Mode
from model.sampler import SamplingRow, sample
from model.shard import Shard
from tests.gpu.test_model import CONFIG, PAGES
from tests.paged_texts import PAGE, PagedTexts
from tests.random_model import RandomModel

ROWS = [
    SamplingRow(temperature=0.0),
    SamplingRow(seed=3, index=7),
    SamplingRow(top_k=5, seed=1),
    SamplingRow(top_p=0.9, min_p=0.1, temperature=0.5),
]
RULES = [
    LogitRules(),
    LogitRules(allowed_ids=(5, 6, 7)),
    LogitRules(bad_words=((4,), (2, 3)), min_tokens=3, stop_ids=(2,)),
    LogitRules(bias=((5, 1.0), (6, -1.0)), repetition_penalty=1.1, frequency_penalty=0.5, presence_penalty=0.1),
]


@pytest.fixture
def waiting_is_refused() -> Iterator[None]:
    """Once the test says so."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_refused")
@pytest.mark.parametrize("mode", [None, "int4", "fp8"])
@pytest.mark.parametrize("prompt", [0, 30])
def test_a_step_waits_for_nothing(device: torch.device, mode: Mode | None, prompt: int) -> None:
    model = Mixtral(CONFIG, RandomModel(CONFIG, device, torch.bfloat16, mode=mode).weights())
    kv = KVCache(CONFIG, Shard(), num_pages=PAGES, page_size=PAGE, dtype=torch.bfloat16, device=device)
    exchange = OneRank(8, SlotLoad(CONFIG.num_hidden_layers, 8))
    rng = random.Random(0)
    sequences = PagedTexts([[rng.randrange(1000) for _ in range(80)] for _ in range(4)], PAGES, rng, device)
    sequences.step([20, 20, 20, 3])
    histories = [History.start([1, 2, 3], CONFIG.vocab_size) for _ in RULES]
    for mode_of_debugging in ("default", "error"):  # what is compiled and made once may wait, the first time
        batch = sequences.step([1, 1, 1, prompt or 1])
        batch = replace(batch, logits_rows=torch.tensor([0, 1, 2, len(batch.token_ids_T) - 1], device=device))
        torch.cuda.set_sync_debug_mode(mode_of_debugging)
        logits_RV = model.logits(model.forward(batch, kv, exchange))
        ids_R = sample(apply_rules(logits_RV, RULES, histories), ROWS)
        torch.cuda.set_sync_debug_mode("default")
        assert all(0 <= token < CONFIG.vocab_size for token in ids_R.tolist())
