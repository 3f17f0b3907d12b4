"""A whole model in bfloat16 on the compiled kernels, beside float32 and beside torch's own bfloat16."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch

from model.backend import backend_for
from model.config import MixtralConfig
from model.cpu_backend import CpuBackend, ExpertLoop
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.layers import Linear, PlainLinear, make_linear
from model.mixtral import Mixtral
from model.native import library
from model.native.backend import NativeBackend, OneCall, fits
from model.shard import Shard
from model.weights import ExpertWeights, MixtralWeights
from tests.paged_texts import PAGE, PagedTexts
from tests.random_model import RandomModel
from tests.tiny import CONFIG

pytestmark = pytest.mark.skipif(
    not library.has_kernels(), reason="no C compiler at installation, or no AVX-512 with BF16 in this processor"
)
CPU = torch.device("cpu")


def random_config(rng: random.Random) -> MixtralConfig:
    """Every expert takes every token: without routing, whose choices jump, errors are those of rounding alone."""
    kv_heads, experts = rng.randint(1, 3), rng.randint(2, 4)
    sizes = {
        "hidden_size": 32 * rng.randint(1, 4),
        "head_dim": 32 * rng.randint(1, 3),
        "intermediate_size": 16 * rng.randint(2, 9),
        "num_attention_heads": kv_heads * rng.randint(1, 5),
        "num_key_value_heads": kv_heads,
        "num_local_experts": experts,
        "num_experts_per_tok": experts,
        "sliding_window": rng.choice([None, None, 3, 8, 17]),
    }
    return MixtralConfig.from_dict(CONFIG | sizes, "config.json")


def changed(weights: MixtralWeights, to: torch.dtype) -> MixtralWeights:
    """The same weights, in another precision and its own layout."""

    def linear(one: Linear) -> Linear:
        return make_linear(one.weight_OI.to(to)) if to == torch.bfloat16 else PlainLinear(one.weight_OI.to(to))

    blocks = tuple(
        replace(
            block,
            attention_norm_D=block.attention_norm_D.to(to),
            qkv=linear(block.qkv),
            output=linear(block.output),
            moe_norm_D=block.moe_norm_D.to(to),
            router_ED=block.router_ED.to(to),
            experts=tuple(ExpertWeights(linear(e.gate_up), linear(e.down)) for e in block.experts),
        )
        for block in weights.blocks
    )
    assert weights.head is not None
    embedding_VD, norm_D, head = weights.embedding_VD.to(to), weights.norm_D.to(to), linear(weights.head)
    return MixtralWeights(0, embedding_VD, blocks, norm_D, head)


def memory(config: MixtralConfig, dtype: torch.dtype) -> KVCache:
    return KVCache(config, Shard(), num_pages=40, page_size=PAGE, dtype=dtype, device=CPU)


@pytest.mark.parametrize("seed", range(40 if os.environ.get("MIXTRAL_TEST_ALL") else 6))
def test_it_is_as_close_to_float32_as_torch_is_however_texts_are_cut_into_steps(seed: int) -> None:
    rng = random.Random(seed)
    config = random_config(rng)
    weights = RandomModel(config, CPU, torch.bfloat16, seed=seed).weights()
    native, exact = changed(weights, torch.bfloat16), changed(weights, torch.float32)
    models = [
        (Mixtral(config, exact), memory(config, torch.float32)),
        (Mixtral(config, native, backend=CpuBackend(config, torch.bfloat16)), memory(config, torch.bfloat16)),
        (Mixtral(config, native, backend=NativeBackend(config, torch.bfloat16)), memory(config, torch.bfloat16)),
    ]
    texts = [[rng.randrange(384) for _ in range(rng.randint(3, 40))] for _ in range(3)]
    sequences = PagedTexts(texts, 40, rng)
    errors = torch.zeros(2)
    while any(done < len(text) for done, text in zip(sequences.done, texts, strict=True)):
        left = [len(text) - done for done, text in zip(sequences.done, texts, strict=True)]
        batch = sequences.step([min(n, rng.choice([0, 1, n, n])) for n in left])
        exchange = OneRank(config.num_local_experts)
        expected, *found = (model.logits(model.forward(batch, kv, exchange)) for model, kv in models)
        errors += torch.tensor([(logits - expected).square().sum() for logits in found])
    torchs, natives = errors.tolist()
    assert natives < 1.2 * torchs


@pytest.mark.parametrize("wanted", [[], [3], [24, 13], [0, 25, 25], [2, 5, 13, 14, 25]])
@pytest.mark.parametrize("first_length", [0, 6])
def test_wanted_rows_alone_have_the_same_bits_and_keys_are_written_for_all(
    wanted: list[int], first_length: int
) -> None:
    config = replace(random_config(random.Random(1)), sliding_window=None)
    model = Mixtral(config, changed(RandomModel(config, CPU, torch.bfloat16).weights(), torch.bfloat16))
    texts = [[rng.randrange(384) for _ in range(20)] for rng in map(random.Random, range(3))]
    found, memories = [], [memory(config, torch.bfloat16) for _ in range(2)]
    for kv in memories:
        sequences = PagedTexts(texts, 40, random.Random(0))
        exchange = OneRank(config.num_local_experts)
        if first_length:
            model.forward(sequences.step([first_length] * 3), kv, exchange)
        batch = sequences.step([13, 1, 12])
        if kv is memories[1]:
            batch = replace(batch, logits_rows=torch.tensor(wanted, dtype=torch.int64))
        found.append(model.forward(batch, kv, exchange))
    assert torch.equal(found[1], found[0][wanted])
    for layer in range(config.num_hidden_layers):
        for one, other in zip(memories[0].layer(layer), memories[1].layer(layer), strict=True):
            assert torch.equal(one, other)


def test_bfloat16_on_a_cpu_takes_the_kernels_where_sizes_fit() -> None:
    config = random_config(random.Random(0))
    assert isinstance(backend_for(config, CPU, torch.bfloat16), NativeBackend)
    assert type(backend_for(config, CPU, torch.float32)) is CpuBackend
    assert not fits(replace(config, head_dim=48), torch.bfloat16)
    assert not fits(replace(config, hidden_size=48), torch.bfloat16)


def test_experts_that_are_not_all_of_one_kind_go_one_after_another() -> None:
    config = random_config(random.Random(0))
    backend = NativeBackend(config, torch.bfloat16)
    plain = RandomModel(config, CPU, torch.bfloat16).weights()
    native = changed(plain, torch.bfloat16).blocks[0].experts
    assert isinstance(backend.experts(native), OneCall)
    mixed = [*native[:-1], plain.blocks[0].experts[-1]]
    loop = backend.experts(mixed)
    assert isinstance(loop, ExpertLoop)
    x_SD = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    experts = config.num_local_experts
    expert_SK, weight_SK = torch.arange(experts).expand(5, -1), torch.full((5, experts), 1 / experts)
    exchange = backend.exchange(OneRank(experts))
    dispatched = exchange.dispatch(0, x_SD, expert_SK, weight_SK)
    whole = exchange.combine(dispatched, backend.experts(native)(dispatched))
    torch.testing.assert_close(exchange.combine(dispatched, loop(dispatched)), whole, rtol=2**-5, atol=2**-5)
    assert not backend.experts([])(OneRank(0).dispatch(0, x_SD[:0], expert_SK[:0], weight_SK[:0])).numel()
