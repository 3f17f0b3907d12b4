"""Our Mixtral against transformers' on random configs, whole and in every way of cutting a text into steps."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from model.batch import Batch
from model.checkpoint import load_weights
from model.config import load_config
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.moe import Routing, load_balancing_loss
from model.shard import Shard
from model.stages import Stages
from tests.paged_texts import PAGE, PagedTexts
from tests.tiny import CONFIG, write_checkpoint

CPU = torch.device("cpu")


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


def expected_logits(directory: Path, texts: list[list[int]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model = transformers.MixtralForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager")
    with torch.inference_mode():
        return [model(torch.tensor([text])).logits[0] for text in texts]


@pytest.mark.parametrize("seed", range(440 if os.environ.get("MIXTRAL_TEST_ALL") else 16))
def test_transformers_agrees_however_texts_are_cut_into_steps(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    directory = write_checkpoint(tmp_path, seed=seed, **random_config(rng))
    config = load_config(directory)
    weights = load_weights(directory, config, Shard(), dtype=torch.float32, device=CPU)
    texts = [[rng.randrange(384) for _ in range(rng.randint(3, 40))] for _ in range(3)]
    model = Mixtral(config, weights)
    kv = KVCache(config, Shard(), num_pages=40, page_size=PAGE, dtype=torch.float32, device=CPU)
    exchange = OneRank(config.num_local_experts)
    sequences = PagedTexts(texts, 40, rng)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(done < len(text) for done, text in zip(sequences.done, texts, strict=True)):
        left = [len(text) - done for done, text in zip(sequences.done, texts, strict=True)]
        lengths = [min(n, rng.choice([0, 1, 1, 5, n])) for n in left]
        logits = model.logits(model.forward(sequences.step(lengths), kv, exchange))
        for seq, rows in enumerate(logits.split(lengths)):
            found[seq].append(rows)
    for seq, expected in enumerate(expected_logits(directory, texts)):
        ours = torch.cat(found[seq])
        if distance(ours, expected) > 2e-5:
            # Two experts all but tied, or a model that magnifies rounding: float64 knows who is right.
            exact = expected_logits(directory, [texts[seq]], torch.float64)[0]
            assert distance(ours, exact) < 2 * distance(expected, exact), f"seed {seed}, sequence {seq}"


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def tiny_model(directory: Path, **overrides: Any) -> tuple[Mixtral, Callable[[], KVCache]]:
    config = load_config(write_checkpoint(directory, **overrides))
    weights = load_weights(directory, config, Shard(), dtype=torch.float32, device=CPU)
    memory = {"num_pages": 16, "page_size": PAGE, "dtype": torch.float32, "device": CPU}
    return Mixtral(config, weights), lambda: KVCache(config, Shard(), **memory)


@pytest.mark.parametrize("wanted", [[], [4], [9, 2], [0, 0, 3]])
def test_rows_whose_logits_are_not_wanted_change_nothing(tmp_path: Path, wanted: list[int]) -> None:
    model, new_memory = tiny_model(tmp_path)
    batch = PagedTexts([[7, 8, 9, 10, 11], [3, 4, 5, 6, 7]], 16, random.Random(0)).step([5, 5])
    some = replace(batch, logits_rows=torch.tensor(wanted, dtype=torch.int64))
    memories = new_memory(), new_memory()
    whole, part = (model.forward(x, kv, OneRank(4)) for x, kv in zip((batch, some), memories, strict=True))
    torch.testing.assert_close(part, whole[wanted], rtol=1e-5, atol=1e-5)
    assert model.logits(part).shape == (len(wanted), 384)
    for layer in range(2):
        for one, other in zip(memories[0].layer(layer), memories[1].layer(layer), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_without_a_head_gives_the_hidden_states_of_transformers(tmp_path: Path, fused: bool) -> None:
    torch.manual_seed(0)
    theirs = transformers.MixtralModel(transformers.MixtralConfig(**CONFIG)).eval()
    torch.nn.init.normal_(theirs.norm.weight)
    theirs.save_pretrained(tmp_path)
    if fused:
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = load_config(tmp_path)
    assert (config.architecture, config.has_head, config.is_language_model) == ("MixtralModel", False, False)
    model = Mixtral(config, load_weights(tmp_path, config, Shard(), dtype=torch.float32, device=CPU))
    kv = KVCache(config, Shard(), num_pages=4, page_size=PAGE, dtype=torch.float32, device=CPU)
    found = model.forward(PagedTexts([[5, 6, 7, 8]], 4, random.Random(0)).step([4]), kv, OneRank(4))
    with torch.inference_mode():
        expected = theirs(torch.tensor([[5, 6, 7, 8]])).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_routing_is_told_to_who_asks_and_changes_nothing(tmp_path: Path) -> None:
    model, new_memory = tiny_model(tmp_path)
    text = [7, 8, 9, 10, 11]
    batch = PagedTexts([text], 16, random.Random(0)).step([5])
    routings: list[Routing] = []
    hidden = model.forward(batch, new_memory(), OneRank(4), routings)
    assert torch.equal(hidden, model.forward(batch, new_memory(), OneRank(4)))
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        answer = theirs(torch.tensor([text]), output_router_logits=True)
    for found, logits_TE in zip(routings, answer.router_logits, strict=True):
        torch.testing.assert_close(found.logits_SE, logits_TE, rtol=2e-5, atol=2e-5)
        probability_SK, expert_SK = logits_TE.softmax(-1).topk(2)
        assert torch.equal(found.expert_SK, expert_SK)
        torch.testing.assert_close(found.weight_SK, probability_SK / probability_SK.sum(-1, keepdim=True))
    torch.testing.assert_close(load_balancing_loss(routings), answer.aux_loss)


def test_the_last_block_routes_the_wanted_rows_alone(tmp_path: Path) -> None:
    model, new_memory = tiny_model(tmp_path)
    batch = PagedTexts([[7, 8, 9, 10, 11]], 16, random.Random(0)).step([5])
    every: list[Routing] = []
    some: list[Routing] = []
    model.forward(batch, new_memory(), OneRank(4), every)
    model.forward(replace(batch, logits_rows=torch.tensor([4, 1])), new_memory(), OneRank(4), some)
    assert torch.equal(some[0].expert_SK, every[0].expert_SK)
    assert torch.equal(some[1].expert_SK, every[1].expert_SK[[4, 1]])


def test_a_step_without_tokens(tmp_path: Path) -> None:
    model, new_memory = tiny_model(tmp_path)
    nothing = torch.empty(0, dtype=torch.int64)
    hidden = model.forward(Batch(nothing, nothing, nothing, (), nothing), new_memory(), OneRank(4))
    assert model.logits(hidden).shape == (0, 384)


def test_time_is_booked_to_the_stages_of_a_step(tmp_path: Path) -> None:
    stages = Stages()
    config = load_config(write_checkpoint(tmp_path))
    weights = load_weights(tmp_path, config, Shard(), dtype=torch.float32, device=CPU)
    kv = KVCache(config, Shard(), num_pages=4, page_size=PAGE, dtype=torch.float32, device=CPU)
    model = Mixtral(config, weights, stages=stages)
    model.logits(model.forward(PagedTexts([[1, 2]], 4, random.Random(0)).step([2]), kv, OneRank(4)))
    assert set(stages.take()) == {"attention", "router", "experts", "exchange", "head"}


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_stays_as_close_to_float32_as_transformers_does(tmp_path: Path, seed: int) -> None:
    """Every expert takes every token: without routing, whose choices jump, errors are those of rounding alone."""
    directory = write_checkpoint(tmp_path, seed=seed, num_experts_per_tok=4)
    config = load_config(directory)
    rng = random.Random(seed)
    text = [rng.randrange(384) for _ in range(24)]
    weights = load_weights(directory, config, Shard(), dtype=torch.bfloat16, device=CPU)
    kv = KVCache(config, Shard(), num_pages=8, page_size=PAGE, dtype=torch.bfloat16, device=CPU)
    model = Mixtral(config, weights)
    ours = model.logits(model.forward(PagedTexts([text], 8, rng).step([24]), kv, OneRank(4)))
    theirs = transformers.MixtralForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.inference_mode():
        other = theirs(torch.tensor([text])).logits[0].float()
    exact = expected_logits(directory, [text])[0]
    assert (ours - exact).square().mean() < 1.5 * (other - exact).square().mean()


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"token_classification_bias": False}])
def test_classifiers_are_those_of_transformers(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    labels = {} if kind == "QuestionAnswering" else {"id2label": {0: "a", 1: "b", 2: "c"}}
    theirs = getattr(transformers, f"MixtralFor{kind}")(transformers.MixtralConfig(**CONFIG | labels | settings)).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)  # norms and biases begin as ones and zeros, which would hide them
    theirs.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    model = Mixtral(config, load_weights(tmp_path, config, Shard(), dtype=torch.float32, device=CPU))
    kv = KVCache(config, Shard(), num_pages=4, page_size=PAGE, dtype=torch.float32, device=CPU)
    batch = PagedTexts([[5, 6, 7, 8, 9, 10]], 4, random.Random(0)).step([6])
    found = model.logits(model.forward(batch, kv, OneRank(4)))
    with torch.inference_mode():
        answer = theirs(torch.tensor([[5, 6, 7, 8, 9, 10]]))
    match kind:
        case "SequenceClassification":
            torch.testing.assert_close(found[-1], answer.logits[0], rtol=2e-5, atol=2e-5)
        case "TokenClassification":
            torch.testing.assert_close(found, answer.logits[0], rtol=2e-5, atol=2e-5)
        case _:
            expected = torch.stack((answer.start_logits[0], answer.end_logits[0]), dim=1)
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
