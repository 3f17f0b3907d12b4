"""What loading a checkpoint needs of a rank's memory at most, beside what the rank then keeps.

    python -m tests.loading_memory SMALL LARGE none int4 ...    one JSON object per line: mode, bytes kept of LARGE and
                                                                at the peak

Each mode has a process of its own: what an earlier load left to the allocator would hide some of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import cast

import torch

from model.checkpoint import load_weights
from model.config import load_config
from model.modes import Mode
from model.shard import Shard
from model.weights import MixtralWeights


def memory(field: str) -> int:
    """Of this process, in bytes: what the kernel counts under this name."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def load(directory: Path, mode: str) -> MixtralWeights:
    wanted = None if mode == "none" else cast(Mode, mode)
    dtype, device = torch.bfloat16, torch.device("cpu")
    return load_weights(directory, load_config(directory), Shard(), dtype=dtype, device=device, quantization=wanted)


def measure(small: Path, large: Path, mode: str) -> None:
    load(small, mode)  # whatever code is needed counts as memory once it has run
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    weights = load(large, mode)
    print(json.dumps({"mode": mode, "kept": weights.nbytes, "peak": memory("VmHWM") - before}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    small, large, *modes = sys.argv[1:]
    for mode in modes:
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
        else:
            measure(Path(small), Path(large), mode)
            os._exit(0)


if __name__ == "__main__":
    main()
