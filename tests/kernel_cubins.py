"""Compiles every kernel for a GPU that need not be there, as a model of Mixtral 8x7B's geometry launches them.

    python -m tests.kernel_cubins [--whole]    one JSON object per line: kernel, constants, bytes of code, shared memory

Every kernel in every mode of weights, in two tilings; with --whole in every one.

A process of its own: Triton decides as it is imported whether kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from model.config import MixtralConfig
from model.quantization import Mode, weights_per_byte

BFLOAT16 = torch.bfloat16
CAPABILITY = 90
EVERY_TILING = (1, 64, 128, 1024)  # tokens of a step
TWO_TILINGS = (1, 128)  # one deeper than a group of weights that share a scale, one as deep
CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}


class Compiler:
    """Stands in for a GPU: launches end where the compiled kernel would be run."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self.compiled: dict[str, Any] = {}
        self._target = GPUTarget("cuda", CAPABILITY, 32)
        driver.set_active(self)
        compile_and_run = JITFunction.run

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = compile_and_run(kernel, *args, grid=grid, warmup=True, **options)
            constants = {name: value for name, value in options.items() if isinstance(value, int | str)}
            self.compiled[json.dumps([kernel.fn.__name__, constants])] = compiled
            return compiled

        JITFunction.run = compile_only

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_all(config: MixtralConfig, tokens: Sequence[int]) -> None:
    """Every kernel as a model of this geometry launches it. Nothing is computed: memory stays virtual."""
    from model.kernels.norm import add_norm, norm
    from model.kernels.paged_decode import PageTable, paged_decode
    from model.kernels.rope_write import rope_write
    from model.kernels.round_rows import round_rows
    from model.kernels.routing import choose_experts, sort_pairs
    from model.kernels.swiglu import swiglu

    D, H, G, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    E, K = config.num_local_experts, config.num_experts_per_tok
    x_SD, weight_D = empty(4, D), empty(D)
    norm(x_SD, weight_D, 1e-5)
    for delta in (x_SD, empty(4, K, D, dtype=torch.float32)):
        add_norm(x_SD, delta, weight_D, 1e-5)
    swiglu(empty(4, 2 * config.intermediate_size))
    round_rows(empty(4, D))
    choose_experts(empty(4, E, dtype=torch.float32), K)
    sort_pairs(torch.zeros(4, K, dtype=torch.int64), E)
    sort_pairs(torch.zeros(1, 1, dtype=torch.int64), E, torch.zeros(E, dtype=torch.int64), torch.zeros(1).int())
    memory = empty(64, G, C), empty(64, G, C)
    rope_write(empty(4, H + 2 * G, C), (empty(4, 1, C), empty(4, 1, C)), torch.zeros(4, dtype=torch.int64), memory)
    table = PageTable(*(torch.zeros(4, dtype=torch.int32) for _ in range(3)))
    paged_decode(empty(4, H, C), memory, table, page_size=16, window=None, splits=8)
    launch_products(config, tokens)


def launch_products(config: MixtralConfig, batches: Sequence[int]) -> None:
    from model.kernels.grouped_experts import grouped_experts
    from model.kernels.quantized_product import quantized_product
    from model.kernels.weight_tiles import WeightStack

    D, F, E = config.hidden_size, config.intermediate_size, config.num_local_experts
    order_P, first_L = torch.zeros(2048, dtype=torch.int32), torch.zeros(E + 1, dtype=torch.int32)
    modes: tuple[Mode, ...] = ("int8", "fp8", "int4", "nf4")
    plain = WeightStack.plain(empty(E, 2 * F, D)), WeightStack.plain(empty(E, D, F))
    quantized = [(stack(mode, E, 2 * F, D), stack(mode, E, D, F)) for mode in modes]
    for tokens in batches:
        weight_SK = empty(tokens, 2, dtype=torch.float32)
        for gate_up, down in (plain, *quantized):
            grouped_experts(empty(tokens, D), order_P[: 2 * tokens], first_L, weight_SK, gate_up, down)
        for mode in modes:
            quantized_product(empty(tokens, D), stack(mode, 1, 6144, D))


def stack(mode: Mode, experts: int, rows: int, columns: int) -> Any:
    from model.kernels.weight_tiles import WeightStack

    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(mode, torch.uint8)
    groups = columns // 64 if weights_per_byte(mode) == 2 else 1
    packed = empty(experts, rows, columns // weights_per_byte(mode), dtype=dtype)
    return WeightStack.quantized(mode, packed, empty(experts, rows, groups))


def empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def compiled_kernels(tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    compiler = Compiler()
    launch_all(MixtralConfig.from_dict(CONFIG, "config.json"), tokens)
    for key, kernel in compiler.compiled.items():
        name, constants = json.loads(key)
        facts = {"cubin_bytes": len(kernel.asm["cubin"]), "shared_bytes": kernel.metadata.shared}
        yield {"kernel": name, "constants": constants} | facts


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ
    for line in compiled_kernels(EVERY_TILING if sys.argv[1:] == ["--whole"] else TWO_TILINGS):
        print(json.dumps(line))
