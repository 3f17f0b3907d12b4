"""From a batch to sampled ids nobody waits for the device: the host may be a whole step ahead of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.messages import SamplingParams
from cluster.sampling import Sampled, choose
from model import device_experts, triton_backend
from model.batch import Batch, SequenceSpan
from model.config import MixtralConfig
from model.device_exchange import padded_alone
from model.device_experts import GroupedProduct, ScaledProduct, plain_product
from model.exchange import OneRank, SlotLoad
from model.graphs import PaddedSteps
from model.kv_cache import KVCache
from model.layers import PlainLinear
from model.logit_rules import History, LogitRules, apply_rules
from model.mixtral import Mixtral
from model.modes import Mode
from model.quantization import QuantizedWeight
from model.quantized_linear import Fp8Linear, KernelLinear, QuantizedLinear
from model.sampler import SamplingRow, sample
from model.shard import Shard
from model.to_device import numbers
from model.varlen_attention import flash_attn_attention, torch_flash_attention
from model.weights import BlockWeights, ExpertWeights, MixtralWeights
from tests import random_model
from tests.kernel_cubins import SIZES_8X7B
from tests.no_waiting import DEVICE, NoWaiting, Waits
from tests.random_model import RandomModel
from tests.tiny import CONFIG

pytest.importorskip("triton", reason="the step's kernels are Triton's")

from triton.runtime.interpreter import InterpretedFunction

from model.kernels.weight_tiles import WeightStack
from model.triton_backend import TritonBackend

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE, SIZES = 256, {"intermediate_size": 128, "vocab_size": 384}


@pytest.fixture(autouse=True)
def kernels_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But they are launched with what a device takes: tensors of its own, and no more programs than there can be."""

    def launch(kernel: InterpretedFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        assert all(x.device == DEVICE for x in args if isinstance(x, Tensor))
        assert all(0 < count <= limit for count, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False))

    monkeypatch.setattr(InterpretedFunction, "run", launch)


def there(value: Any) -> Any:
    """The same weights without their numbers."""
    match value:
        case Tensor():
            return value.to(DEVICE)
        case PlainLinear():
            return PlainLinear(value.weight_OI.to(DEVICE))
        case QuantizedLinear():
            weight = value.weight
            moved = QuantizedWeight(weight.mode, there(weight.packed_OP), there(weight.scale_OG))
            in_fp8 = weight.mode == "fp8" and value._dtype == torch.bfloat16
            return Fp8Linear(moved) if in_fp8 else KernelLinear(moved, value._dtype)
        case tuple():
            return tuple(map(there, value))
        case ExpertWeights() | BlockWeights() | MixtralWeights():
            return replace(value, **{name: there(getattr(value, name)) for name in value.__dataclass_fields__})
    return value


def tiny(mode: Mode | None, window: int | None, dtype: torch.dtype = torch.float32) -> tuple[Mixtral, KVCache]:
    config = MixtralConfig.from_dict(CONFIG | SIZES | {"sliding_window": window}, "config.json")
    weights = there(RandomModel(config, torch.device("cpu"), dtype, mode=mode).weights())
    kv = KVCache(config, Shard(), num_pages=8, page_size=PAGE, dtype=dtype, device=DEVICE)
    return Mixtral(config, weights), kv


def batch(spans: list[SequenceSpan]) -> Batch:
    rows = sum(span.length for span in spans)
    numbers_T = [torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in range(3)]
    return Batch(*numbers_T, tuple(spans), torch.zeros(len(spans), dtype=torch.int64, device=DEVICE))


DECODES = [SequenceSpan(0, 1, 300, ((3, 1), (5, 1))), SequenceSpan(1, 1, 7, ((0, 1),))]
CHUNK = SequenceSpan(2, 5, 260, ((1, 2),))


@pytest.mark.parametrize("mode", [None, "int4", "fp8"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("spans", [DECODES, [*DECODES, CHUNK]], ids=["decodes", "with a prompt"])
def test_a_step_does_not_wait(mode: Mode | None, window: int | None, spans: list[SequenceSpan]) -> None:
    model, kv = tiny(mode, window)
    exchange = OneRank(4, SlotLoad(2, 4))
    step = batch(spans)
    model.forward(step, kv, exchange)  # what is made once, of a first step, may wait
    with NoWaiting():
        assert model.logits(model.forward(step, kv, exchange)).shape == (len(spans), 384)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensor cores and torch's flash kernels compute is asked of them, in torch's own terms."""

    def grouped(stack: WeightStack, dtype: torch.dtype) -> GroupedProduct | None:
        match stack.mode:
            case "plain":
                return partial(plain_product, stack.packed_EOP.mT)
            case "fp8":
                return ScaledProduct(stack)
        return None

    monkeypatch.setattr(device_experts, "grouped_product_for", grouped)
    monkeypatch.setattr(triton_backend, "varlen_attention_for", lambda *_: torch_flash_attention)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("mode", [None, "fp8"])
@pytest.mark.parametrize("window", [None, 100])
def test_a_long_prompt_on_tensor_cores_does_not_wait(mode: Mode | None, window: int | None) -> None:
    model, kv = tiny(mode, window, torch.bfloat16)
    step = batch([*DECODES, SequenceSpan(2, 160, 260, ((1, 2),))])
    model.forward(step, kv, OneRank(4))
    with NoWaiting():
        hidden_RD = model.forward(step, kv, OneRank(4))
    assert (hidden_RD.shape, hidden_RD.dtype) == ((3, 64), torch.bfloat16)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("mode", [None, "fp8", "int4"])
def test_steps_of_full_size_are_what_kernels_and_torch_take(mode: Mode | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of Mixtral 8x7B: 256 texts decoded and a long prompt at once; memory is none."""
    monkeypatch.setattr(random_model.torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(Tensor, "normal_", lambda x, **options: x)
    config = MixtralConfig.from_dict(SIZES_8X7B | {"num_hidden_layers": 1}, "config.json")
    weights = there(RandomModel(config, DEVICE, torch.bfloat16, mode=mode).weights())
    kv = KVCache(config, Shard(), num_pages=1 << 15, page_size=16, dtype=torch.bfloat16, device=DEVICE)
    decodes = [SequenceSpan(row, 1, 1000 + row, ((80 * row, 79),)) for row in range(256)]
    model = Mixtral(config, weights)
    for spans in (decodes, [*decodes, SequenceSpan(256, 8192, 8192, ((30000, 512),))]):
        logits_RV = model.logits(model.forward(batch(spans), kv, OneRank(8)))
        assert (logits_RV.shape, logits_RV.dtype) == ((len(spans), 32000), torch.float32)


def captured(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """On a device without graphs a replay has nothing to compute."""
    return (lambda: None), compute()


def test_a_replayed_step_does_not_wait() -> None:
    config = MixtralConfig.from_dict(CONFIG | SIZES, "config.json")
    weights = there(RandomModel(config, torch.device("cpu"), torch.float32).weights())
    kv = KVCache(config, Shard(), num_pages=8, page_size=PAGE, dtype=torch.float32, device=DEVICE)
    model = Mixtral(config, weights, backend=TritonBackend(config, DEVICE, torch.float32, lambda: captured))
    graphs = model.decode_graphs(PaddedSteps(kv, 4, padded_alone(OneRank(4, SlotLoad(2, 4)))))
    with NoWaiting():
        graphs.capture(4)
        assert graphs.replay(batch(DECODES), 4, [2]).shape == (2, 64)


def test_flash_attns_pages_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("flash_attn")
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
        fake.__dict__[name] = lambda query, *args, **options: query
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(triton_backend, "varlen_attention_for", lambda *_: flash_attn_attention)
    model, kv = tiny(None, None)
    with NoWaiting():
        model.forward(batch([*DECODES, CHUNK]), kv, OneRank(4))


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


def test_choosing_tokens_does_not_wait() -> None:
    logits_RV = torch.empty(4, 384, device=DEVICE)
    histories = [History.start([1, 2, 3], 384) for _ in RULES]
    with NoWaiting():
        assert sample(apply_rules(logits_RV, RULES, histories), ROWS).shape == (4,)


class AllowsAll:
    """A grammar's matcher."""

    def mask(self) -> bytes:
        return b"\xff" * (384 // 8)

    def accept(self, token_id: int) -> None:
        """Anything."""


def test_rules_and_grammars_wait_once_for_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have to know it before the next step; nothing before that is asked."""
    sampled = [
        Sampled(SamplingParams(8, seed=0), 0, rules, History.start([1, 2, 3], 384), AllowsAll())  # type: ignore[arg-type]
        for rules in RULES[1:]
    ]
    asked: list[Tensor] = []

    def told(x: Tensor) -> list[list[int]]:
        asked.append(x)
        return [[7] * x.shape[1]] * len(x)

    monkeypatch.setattr(Tensor, "tolist", told)
    with NoWaiting():
        choose(torch.empty(3, 384, device=DEVICE), sampled)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: torch.tensor([1.0], device=DEVICE),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0, 2.0]).to(DEVICE),
        lambda x: x.copy_(torch.ones(3, 4)),
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: x.index_select(0, torch.tensor([0, 1])),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_what_waits_is_found(waits: Callable[[Tensor], object], inference: bool) -> None:
    with NoWaiting(), torch.inference_mode(inference), pytest.raises(Waits):
        waits(torch.empty(3, 4, device=DEVICE))


@pytest.mark.parametrize(
    "reads", [Tensor.tolist, Tensor.cpu, Tensor.nonzero, lambda x: x[0, 0].item(), lambda x: bool(x[0, 0] > 0)]
)
def test_what_reads_numbers_fails_by_itself(reads: Callable[[Tensor], object]) -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        reads(torch.empty(3, 4, device=DEVICE))


def test_what_need_not_wait_does_not() -> None:
    x = torch.empty(3, 4, device=DEVICE)
    with NoWaiting():
        index = numbers([0, 2], torch.int64, DEVICE)
        x[index, 1] = 0.0
        x[:2, 0] += x[index, 0]
