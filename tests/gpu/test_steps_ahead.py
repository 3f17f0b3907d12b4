"""Steps are launched one after another before anybody knows what the first of them sampled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentencepiece", reason="a worker needs it")
pytest.importorskip("jinja2", reason="a worker needs it")

import model.demo
from cluster.config import EngineConfig, KVConfig
from cluster.messages import LAST_SAMPLED, SamplingParams, SequenceChunk, SequenceStart, StepPlan
from cluster.placement import even_placement
from cluster.worker import Worker
from model.comm import alone
from model.config import load_config

DEMO = Path(str(model.demo.__file__)).parent
PAGE = 16
PROMPT = tuple(range(20, 33))
DECODES = 40
PAGES_EACH = -(-(len(PROMPT) + DECODES) // PAGE)
SAMPLING = (
    SamplingParams(DECODES, temperature=0.0, seed=0),
    SamplingParams(DECODES, temperature=0.8, seed=1),
    SamplingParams(DECODES, temperature=1.0, seed=2, top_p=0.9, top_k=40),
)


def plans() -> Iterator[StepPlan]:
    """A prompt for each way of sampling, then one token a step."""
    starts, chunks = [], []
    for seq, sampling in enumerate(SAMPLING):
        prompt = (*PROMPT[:-1], 50 + seq)
        pages = tuple(range(seq * PAGES_EACH, (seq + 1) * PAGES_EACH))
        starts.append(SequenceStart(seq, prompt, len(prompt), sampling))
        chunks.append(SequenceChunk(seq, prompt, 0, pages, True))
    yield StepPlan(0, tuple(chunks), tuple(starts))
    for step in range(DECODES):
        position = len(PROMPT) + step
        decodes = tuple(SequenceChunk(seq, (LAST_SAMPLED,), position, (), True) for seq in range(len(SAMPLING)))
        yield StepPlan(1 + step, decodes)


@pytest.fixture
def waiting_is_refused() -> Iterator[None]:
    """Once the test says so."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_refused")
def test_steps_launched_ahead_sample_what_they_sample_one_by_one(device: torch.device) -> None:
    config = load_config(DEMO)
    placement = even_placement(config.num_hidden_layers, config.num_local_experts, 1)
    worker = Worker(0, EngineConfig(str(DEMO), device="cuda", kv=KVConfig(page_size=PAGE)), placement)
    worker.load()
    pages = PAGES_EACH * len(SAMPLING)
    worker.join(alone(), pages)
    one_by_one = [worker.step(plan).token_ids for plan in plans()]
    worker.join(alone(), pages)
    launched = []
    for plan in plans():
        prepared = worker.prepare(plan)
        torch.cuda.set_sync_debug_mode("error")  # all is compiled by now, so nothing has a reason to wait
        launched.append(worker.compute(prepared))
        torch.cuda.set_sync_debug_mode("default")
    assert [output.result().token_ids for output in launched] == one_by_one
