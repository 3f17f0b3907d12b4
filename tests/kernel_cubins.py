"""Compiles every kernel for a GPU that need not be there, as models of Mixtral's geometries launch them.

    python -m tests.kernel_cubins [--whole]    one JSON object per line: kernel, precision, constants, and what it
                                               takes: bytes of code, shared memory and stack, registers of a thread

As 8x7B does in bfloat16: every kernel in every mode of weights, in two tilings; and in float32, as the demo model does,
with plain weights. With --whole in every precision, mode and tiling, and as 8x22B does in bfloat16.

A process of its own: Triton decides as it is imported whether kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from model.config import MixtralConfig
from model.modes import Mode, weights_per_byte

CAPABILITY = 90
EVERY_TILING = (1, 64, 128, 1024)  # tokens of a step
TWO_TILINGS = (1, 128)  # one deeper than a group of weights that share a scale, one as deep
EVERY_SPLIT = (8, 16, 32, 64)
MODES: tuple[Mode, ...] = get_args(Mode)
SIZES_8X7B = {
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
SIZES_8X22B = SIZES_8X7B | {
    "vocab_size": 32768,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "max_position_embeddings": 65536,
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
            self.compiled[json.dumps([kernel.fn.__name__, constants, compiled.hash])] = compiled
            return compiled

        JITFunction.run = compile_only

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launches:
    """Of a model of this geometry. Nothing is computed: memory stays virtual."""

    config: MixtralConfig
    dtype: torch.dtype
    tokens: Sequence[int]  # of steps
    modes: Sequence[Mode] = MODES
    splits: Sequence[int] = (8,)

    def all(self) -> None:
        from model.kernels.norm import add_norm, norm
        from model.kernels.rope_write import rope_write
        from model.kernels.round_rows import round_rows
        from model.kernels.routing import choose_experts, route_rows
        from model.kernels.swiglu import swiglu

        config, empty = self.config, self.empty
        D, H, G, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        E, K = config.num_local_experts, config.num_experts_per_tok
        x_SD, weight_D = empty(4, D), empty(D)
        norm(x_SD, weight_D, 1e-5)
        for delta in (x_SD, torch.empty(4, K, D)):
            add_norm(x_SD, delta, weight_D, 1e-5)
        swiglu(empty(4, 2 * config.intermediate_size))
        round_rows(empty(4, D))
        choose_experts(torch.empty(4, E), K)
        route_rows(x_SD, empty(E, D), K)
        memory = empty(64, G, C), empty(64, G, C)
        for begin in (0, 1):  # where one copy to the device has put them
            slots = int64(5)[begin : begin + 4]
            rope_write(empty(4, H + 2 * G, C), (empty(4, 1, C), empty(4, 1, C)), slots, memory)
        self.sorts()
        self.decodes()
        self.products()

    def sorts(self) -> None:
        from model.kernels.routing import sort_pairs

        E, K = self.config.num_local_experts, self.config.num_experts_per_tok
        for tokens in self.tokens:
            sort_pairs(int64(tokens, K), E)
        for layer in (0, 1):
            sort_pairs(int64(1, 1), E, int64(2, E + 1)[layer, :E], torch.zeros(1).int())

    def decodes(self) -> None:
        from model.kernels.paged_decode import PageTable, paged_decode

        H, G, C = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        memory = self.empty(64, G, C), self.empty(64, G, C)
        table = PageTable(*(torch.zeros(4, dtype=torch.int32) for _ in range(3)))
        for splits in self.splits:
            paged_decode(self.empty(4, H, C), memory, table, page_size=16, window=None, splits=splits)

    def products(self) -> None:
        from model.kernels.grouped_experts import grouped_experts
        from model.kernels.quantized_product import quantized_product
        from model.kernels.weight_tiles import WeightStack

        D, F, E = self.config.hidden_size, self.config.intermediate_size, self.config.num_local_experts
        order_P, first_L = torch.zeros(2048, dtype=torch.int32), torch.zeros(E + 1, dtype=torch.int32)
        plain = WeightStack.plain(self.empty(E, 2 * F, D)), WeightStack.plain(self.empty(E, D, F))
        quantized = [(self.stack(mode, E, 2 * F, D), self.stack(mode, E, D, F)) for mode in self.modes]
        for tokens in self.tokens:
            for gate_up, down in (plain, *quantized):
                weight_SK = torch.empty(tokens, 2)
                grouped_experts(self.empty(tokens, D), order_P[: 2 * tokens], first_L, weight_SK, gate_up, down)
            for mode in self.modes:
                quantized_product(self.empty(tokens, D), self.stack(mode, 1, 6144, D))

    def stack(self, mode: Mode, experts: int, rows: int, columns: int) -> Any:
        from model.kernels.weight_tiles import WeightStack

        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(mode, torch.uint8)
        groups = columns // 64 if weights_per_byte(mode) == 2 else 1
        scale_dtype = torch.float32 if mode == "nf4" else torch.bfloat16
        packed = torch.empty(experts, rows, columns // weights_per_byte(mode), dtype=dtype)
        return WeightStack.quantized(mode, packed, torch.empty(experts, rows, groups, dtype=scale_dtype))

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=self.dtype)


def int64(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def quickly() -> list[Launches]:
    config = MixtralConfig.from_dict(SIZES_8X7B, "config.json")
    return [Launches(config, torch.bfloat16, TWO_TILINGS), Launches(config, torch.float32, (1,), modes=())]


def whole() -> list[Launches]:
    large, larger = (MixtralConfig.from_dict(sizes, "config.json") for sizes in (SIZES_8X7B, SIZES_8X22B))
    models = [(large, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    return [Launches(*model, EVERY_TILING, splits=EVERY_SPLIT) for model in [*models, (larger, torch.bfloat16)]]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a thread, by the tool that Triton brings. Whatever does not fit in registers is there."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name.lower(): int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", dump)}


def compiled_kernels(models: Sequence[Launches]) -> Iterator[dict[str, Any]]:
    compiler = Compiler()
    for model in models:
        model.all()
        for key, kernel in compiler.compiled.items():
            name, constants, _ = json.loads(key)
            facts = {"cubin_bytes": len(kernel.asm["cubin"]), "shared_bytes": kernel.metadata.shared}
            told = {"kernel": name, "dtype": str(model.dtype), "width": model.config.hidden_size}
            yield told | {"constants": constants} | facts | resources(kernel.asm["cubin"])
        compiler.compiled.clear()


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ
    for line in compiled_kernels(whole() if sys.argv[1:] == ["--whole"] else quickly()):
        print(json.dumps(line))
