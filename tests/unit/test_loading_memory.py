"""Loading needs little more memory than what it loads takes, quantised or not; measured, not reckoned."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.config import MixtralConfig
from model.dialects import HUGGING_FACE, all_matrices, locate
from tests.tiny import CONFIG, write_checkpoint

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"head_dim": 64, "intermediate_size": 128, "torch_dtype": "bfloat16"}
LARGE = CONFIG | {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "torch_dtype": "bfloat16",
}


def write_zeros(directory: Path, raw: dict[str, Any]) -> Path:
    """A checkpoint of that shape whose weights are a hole in a file: 220 MB that nobody wrote."""
    config = MixtralConfig.from_dict(raw, "config.json")
    header: dict[str, Any] = {}
    end = 0
    for stored in (locate(HUGGING_FACE, config, matrix) for matrix in all_matrices(config)):
        start, end = end, end + 2 * math.prod(stored.tensor_shape)
        header[stored.name] = {"dtype": "BF16", "shape": stored.tensor_shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    file = directory / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="memory is what Linux says of a process")
def test_loading_takes_at_most_a_third_more_than_the_weights(tmp_path: Path) -> None:
    modes = ["none", "int8", "int4", "nf4", "fp8"] if os.environ.get("MIXTRAL_TEST_ALL") else ["int4"]
    small, large = write_checkpoint(tmp_path / "small", **SMALL), write_zeros(tmp_path / "large", LARGE)
    command = [sys.executable, "-m", "tests.loading_memory", str(small), str(large), *modes]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = [json.loads(line) for line in output.splitlines()]
    assert [line["mode"] for line in found] == modes
    for line in found:
        assert line["peak"] < 1.3 * line["kept"], line
