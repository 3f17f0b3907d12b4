"""Kernels that ran in the interpreter also compile for a GPU (sm_90), and fit the shared memory of smaller ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

ROOT = Path(__file__).parents[2]
KERNELS = {
    "_add_norm", "_choose", "_route", "_sort", "_rope_write", "_attend_split", "_merge",
    "_gate_up", "_down", "_quantized_product", "_swiglu", "_round_rows",
}  # fmt: skip


def test_every_kernel_compiles() -> None:
    whole = ["--whole"] if os.environ.get("MIXTRAL_TEST_ALL") else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernel_cubins", *whole]
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    compiled = [json.loads(line) for line in output.splitlines()]
    assert {line["kernel"] for line in compiled} == KERNELS
    # What lies anywhere in a longer piece of memory needs no kernel of its own: a server would compile it in a step.
    models = {(line["dtype"], line["width"]) for line in compiled}
    assert [line["kernel"] for line in compiled].count("_rope_write") == len(models)
    assert sum(line["kernel"] == "_sort" and line["constants"]["K"] == 1 for line in compiled) == len(models)
    for line in compiled:
        assert line["cubin_bytes"] > 0
        assert line["shared_bytes"] <= 99 << 10, line
        # What was meant for registers and lies on the stack is memory traffic. float32 is not for speed.
        assert line["stack"] == 0 or line["dtype"] == "torch.float32", line
