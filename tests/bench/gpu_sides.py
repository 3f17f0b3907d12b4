"""What the GPU bench measures: our model, transformers' beside it on the same weights, and the machine under both.

B: texts.  L: tokens of a prompt.  D: model width.  E: experts.  F: ffn width.  G: key-value heads.  C: head_dim.
V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
import transformers
from torch import Tensor

from model.batch import Batch, SequenceSpan
from model.config import MixtralConfig
from model.device_exchange import padded_alone
from model.exchange import OneRank
from model.expert_stack import together
from model.graphs import DecodeGraphs, PaddedSteps
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.modes import Mode
from model.moe import Routing
from model.shard import Shard
from model.weights import MixtralWeights

DTYPE = torch.bfloat16
# Bits that a weight of a block takes, its share of scales included; embedding, head and routers keep 16.
BITS: dict[Mode | None, float] = {None: 16, "fp8": 8, "int8": 8, "int4": 4.25, "nf4": 4.5}
WITHIN_S = 4.0

Ways = dict[str, Callable[[], object]]  # of transformers with experts, by name


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, turns: int) -> float:
    """Median seconds of so many turns, or of as many as end within a few seconds.

    The first, which may compile kernels, is thrown away.
    """
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) <= turns and sum(seconds[1:]) < WITHIN_S):
        synchronize(device)
        start = perf_counter()
        work()
        synchronize(device)
        seconds.append(perf_counter() - start)
    return median(seconds[1:])


@dataclass(frozen=True)
class Machine:
    """What is possible here at best, in bytes and operations per second, measured in this process."""

    bandwidth: float
    speed: float
    fp8_speed: float  # of numbers of one byte, where a device multiplies them as they are; else the same

    @classmethod
    def measured(cls, device: torch.device, *, small: bool) -> Machine:
        source = torch.ones(1 << (24 if small else 31), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / timed(partial(target.copy_, source), device, 20)
        N = 256 if small else 8192
        x_NN = torch.randn(N, N, device=device, dtype=DTYPE)
        speed = 2 * N**3 / timed(partial(torch.mm, x_NN, x_NN), device, 20)
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
            return cls(bandwidth, speed, speed)
        code_NN, scale_N1 = x_NN.to(torch.float8_e4m3fn), torch.ones(N, 1, device=device)
        scale_1N = scale_N1.T.contiguous()
        product = partial(torch._scaled_mm, code_NN, code_NN.T, scale_a=scale_N1, scale_b=scale_1N, out_dtype=DTYPE)
        return cls(bandwidth, speed, 2 * N**3 / timed(product, device, 20))


@dataclass(frozen=True)
class Geometry:
    """How many bytes a step must read and how many operations it must do."""

    config: MixtralConfig
    mode: Mode | None

    @property
    def _attention(self) -> int:
        c = self.config
        return c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)

    @property
    def _expert(self) -> int:
        return 3 * self.config.hidden_size * self.config.intermediate_size

    @property
    def _head(self) -> int:
        return self.config.hidden_size * self.config.vocab_size

    @property
    def key_bytes(self) -> int:
        """Of one token in page memory, all layers."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * DTYPE.itemsize

    def weight_bytes(self) -> float:
        c = self.config
        blocks = c.num_hidden_layers * (self._attention + c.num_local_experts * self._expert)
        return blocks * BITS[self.mode] / 8 + 2 * self._head * DTYPE.itemsize

    def decode_floor(self, machine: Machine, batch: int, context: int, experts_touched: int) -> float:
        """Seconds; experts_touched counts over all layers."""
        c = self.config
        weights = c.num_hidden_layers * self._attention + experts_touched * self._expert
        moved = weights * BITS[self.mode] / 8 + self._head * DTYPE.itemsize + batch * context * self.key_bytes
        return max(moved / machine.bandwidth, self._operations(batch, batch, batch * context) / self._speed(machine))

    def prefill_floor(self, machine: Machine, length: int) -> float:
        operations = self._operations(length, 1, length**2 / 2)
        return max(operations / self._speed(machine), self.weight_bytes() / machine.bandwidth)

    def _speed(self, machine: Machine) -> float:
        """Attention itself is a few percent, and counted as if it were quantised too."""
        return machine.fp8_speed if self.mode == "fp8" else machine.speed

    def _operations(self, rows: int, logits_rows: int, pairs: float) -> float:
        """`pairs`: of a row and a key that it sees."""
        c = self.config
        per_row = c.num_hidden_layers * (self._attention + c.num_experts_per_tok * self._expert)
        attention = 4 * pairs * c.num_hidden_layers * c.num_attention_heads * c.head_dim
        return 2 * rows * per_row + 2 * logits_rows * self._head + attention


class Ours:
    """Contexts are random keys and values: nothing is computed to fill them."""

    def __init__(
        self,
        config: MixtralConfig,
        device: torch.device,
        weights: MixtralWeights,
        *,
        max_batch: int,
        room: int,
        page_size: int,
    ) -> None:
        """`room`: tokens that each of max_batch texts may have; one text alone may have all of it."""
        self._config, self._device, self._page_size = config, device, page_size
        self.model = Mixtral(config, weights)
        self._pages = -(-room // page_size)
        self._kv = KVCache(
            config, Shard(), num_pages=max_batch * self._pages, page_size=page_size, dtype=DTYPE, device=device
        )
        for layer in range(config.num_hidden_layers):
            for memory in self._kv.layer(layer):
                memory.normal_()
        self._exchange = OneRank(config.num_local_experts)
        self._max_batch = max_batch
        self._graphs: DecodeGraphs | None = None

    def capture(self, sizes: Sequence[int]) -> bool:
        """Decode steps of these sizes are replayed from now on, where the device has graphs; whether it has."""
        if self._device.type != "cuda":
            return False
        graphs = self.model.decode_graphs(PaddedSteps(self._kv, self._max_batch, padded_alone(self._exchange)))
        for size in sorted(sizes, reverse=True):
            graphs.capture(size)
        self._graphs = graphs
        return True

    def step(self, batch: Batch) -> list[int]:
        """As a server does it: the next token of each text, known to the host."""
        size = len(batch.spans)
        if self._graphs is not None and len(batch.token_ids_T) == size:
            hidden_RD = self._graphs.replay(batch, size, [size])
        else:
            hidden_RD = self.model.forward(batch, self._kv, self._exchange)
        ids: list[int] = self.model.logits(hidden_RD).argmax(-1).tolist()
        return ids

    def decode_batch(self, size: int, context: int) -> Batch:
        return self._batch([(text, 1, context) for text in range(size)])

    def prefill_batch(self, length: int) -> Batch:
        return self._batch([(0, length, length)])

    def logits(self, length: int) -> Tensor:
        """Of the token that follows a prompt, (V,)."""
        return self.model.logits(self.model.forward(self.prefill_batch(length), self._kv, self._exchange))[0]

    def experts_touched(self, batch: Batch) -> int:
        routings: list[Routing] = []
        self.model.forward(batch, self._kv, self._exchange, routings)
        return sum(len(routing.expert_SK.unique()) for routing in routings)

    def _batch(self, chunks: list[tuple[int, int, int]]) -> Batch:
        size = self._page_size
        spans, ids, positions, slots = [], [], [], []
        for text, length, context in chunks:
            spans.append(SequenceSpan(len(ids), length, context, ((text * self._pages, -(-context // size)),)))
            position = range(context - length, context)
            positions += position
            slots += [text * self._pages * size + p for p in position]
            ids += [(text * 7919 + p) % self._config.vocab_size for p in position]  # the first text's as prompt_ids()
        rows = [span.row + span.length - 1 for span in spans]
        tensors = [torch.tensor(values, device=self._device) for values in (ids, positions, slots)]
        return Batch(*tensors, tuple(spans), torch.tensor(rows, device=self._device))


class Theirs:
    """transformers' model around our weights, computed by the fastest of its ways with experts."""

    def __init__(self, config: MixtralConfig, device: torch.device, weights: MixtralWeights) -> None:
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
            "rms_norm_eps",
        )  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": config.rope_parameters.rope_theta}
        settings = transformers.MixtralConfig(**{name: getattr(config, name) for name in names}, rope_parameters=rope)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=DTYPE, attn_implementation="sdpa")
        model.load_state_dict(dict(named(weights, config)), assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)  # no weight, so not among them
        self._model = model.eval()
        self._config, self._device = config, device

    def prefill_ways(self, length: int) -> Ways:
        return {name: partial(self._prefill, name, length) for name in ("grouped_mm", "eager")}

    def decode_ways(self, batch: int, context: int) -> Ways:
        """Of one step of so many texts with random contexts, each turn the same."""
        # batched_mm copies the weights of every row's experts: not worth trying for many.
        names = ("grouped_mm", "eager", *(["batched_mm"] if batch == 1 else []))
        cache = self._cache(batch, context)
        tokens_B1 = torch.randint(self._config.vocab_size, (batch, 1), device=self._device)
        return {name: partial(self._decode, name, tokens_B1, cache) for name in names}

    def logits(self, length: int) -> Tensor:
        return self._prefill("grouped_mm", length)[0, -1].float()

    @torch.inference_mode()
    def _prefill(self, name: str, length: int) -> Tensor:
        self._model.set_experts_implementation(name)
        tokens_1L = torch.tensor([prompt_ids(self._config, length)], device=self._device)
        cache = transformers.DynamicCache(config=self._model.config)
        logits_11V: Tensor = self._model(tokens_1L, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits_11V

    @torch.inference_mode()
    def _decode(self, name: str, tokens_B1: Tensor, cache: transformers.DynamicCache) -> list[int]:
        self._model.set_experts_implementation(name)
        found = self._model(tokens_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)  # what this step has added
        ids: list[int] = found.logits[:, -1].argmax(-1).tolist()
        return ids

    @torch.inference_mode()
    def _cache(self, batch: int, context: int) -> transformers.DynamicCache:
        cache = transformers.DynamicCache(config=self._model.config)
        shape = batch, self._config.num_key_value_heads, context, self._config.head_dim
        for layer in range(self._config.num_hidden_layers):
            key, value = (torch.randn(shape, device=self._device, dtype=DTYPE) for _ in range(2))
            cache.update(key, value, layer)
        return cache


def prompt_ids(config: MixtralConfig, length: int) -> list[int]:
    return [position % config.vocab_size for position in range(length)]


def named(weights: MixtralWeights, config: MixtralConfig) -> Iterator[tuple[str, Tensor]]:
    """As transformers calls them: the same memory, seen in its shapes."""
    queries, keys = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    assert weights.head is not None
    yield "model.embed_tokens.weight", weights.embedding_VD
    yield "model.norm.weight", weights.norm_D
    yield "lm_head.weight", weights.head.weight_OI
    for layer, block in enumerate(weights.blocks):
        prefix = f"model.layers.{layer}."
        for name, part in zip("qkv", torch.split(block.qkv.weight_OI, [queries, keys, keys]), strict=True):
            yield f"{prefix}self_attn.{name}_proj.weight", part
        yield f"{prefix}self_attn.o_proj.weight", block.output.weight_OI
        yield f"{prefix}input_layernorm.weight", block.attention_norm_D
        yield f"{prefix}post_attention_layernorm.weight", block.moe_norm_D
        yield f"{prefix}mlp.gate.weight", block.router_ED
        yield f"{prefix}mlp.experts.gate_up_proj", together([expert.gate_up.weight_OI for expert in block.experts])
        yield f"{prefix}mlp.experts.down_proj", together([expert.down.weight_OI for expert in block.experts])
