"""Full-size Mixtral on one GPU: decode and prefill beside their floors and beside transformers, one table, one picture.

    python -m tests.bench.bench_gpu [--out docs/gpu]          Mixtral 8x7B; no download, no network, no ray
    python -m tests.bench.bench_gpu --geometry tiny --device cpu      whether the bench itself works

Weights are random and made on the device; transformers computes with the same ones. Floors are of this machine,
measured in this process: bytes that a step must read at the rate of a large copy, operations at the rate of a large
product. A decode step is what a server waits for: from the batch on the host to the next tokens on the host.

It ends within the seconds it is given: each side has an equal share of what the sides before it left, and says which
rows it had no time for. Each row is printed and written as soon as it is measured, the picture after each side, so a
run that is cut short keeps what it has; and a side that fails costs its own rows only.
"""

from __future__ import annotations

import argparse
import gc
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import cast

import torch
import transformers
from torch import Tensor

from model.config import MixtralConfig
from model.modes import Mode
from model.weights import MixtralWeights
from tests.bench.gpu_sides import DTYPE, Geometry, Machine, Ours, Theirs, Ways, timed
from tests.bench.gpu_table import HEADER, THEIRS, Line, Report
from tests.random_model import RandomModel

SIZES = {
    "8x7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_theta": 1e6,
    },
}


class Allowance:
    """Seconds for several sides, one after another: each may use an equal share of what is left when it begins."""

    def __init__(self, seconds: float, sides: int) -> None:
        self._end = self._until = monotonic() + seconds
        self._sides = sides

    def begin(self) -> None:
        now = monotonic()
        self._until = now + max(0.0, self._end - now) / self._sides
        self._sides -= 1

    @property
    def used_up(self) -> bool:
        return monotonic() >= self._until


@dataclass
class Bench:
    config: MixtralConfig
    device: torch.device
    machine: Machine
    batches: Sequence[int]
    prompts: Sequence[int]
    context: int
    turns: int
    page_size: int
    report: Report
    allowance: Allowance
    sound: bool = True  # nothing has failed
    _their_logits: Tensor | None = None  # after the shortest prompt, of the weights that ours has in bfloat16

    def run(self, modes: Sequence[Mode | None], *, alone: bool) -> None:
        """One side after another. Whichever fails says why, and the next has its turn."""
        for mode in modes:
            self.guarded(mode or "bfloat16", partial(self._side, mode, alone))

    def _side(self, mode: Mode | None, alone: bool) -> None:
        weights = RandomModel(self.config, self.device, DTYPE, mode=mode).weights()
        if mode is None and not alone:
            self.guarded(THEIRS, partial(self.theirs, weights))
        self.ours(mode, weights)

    def guarded(self, name: str, measure: Callable[[], None]) -> None:
        gc.collect()  # what the last side held
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            self.sound = False
            self.report.failed(name, error)
        finally:
            self.report.draw()

    def ours(self, mode: Mode | None, weights: MixtralWeights) -> None:
        self.allowance.begin()
        geometry, name = Geometry(self.config, mode), mode or "bfloat16"
        theirs = {(line.work, line.size): line for line in self.report.lines if line.weights == THEIRS}
        room = max(self.context, -(-max(self.prompts) // max(self.batches)))
        ours = Ours(self.config, self.device, weights, max_batch=max(self.batches), room=room, page_size=self.page_size)
        self.report.add(f"# {name}: weights take {weights.nbytes / 1e9:.1f} GB")

        def add(work: str, size: int, seconds: float, floor: float, without_graph: float | None = None) -> None:
            beside = theirs.get((work, size)) if mode is None else None
            self.report.add(Line(name, work, size, seconds, floor, without_graph, theirs=beside))

        plain: dict[int, float] = {}
        for size in self._in_time(name, "decode", self.batches):
            plain[size] = timed(partial(ours.step, ours.decode_batch(size, self.context)), self.device, self.turns)
        captured = self._capture(name, ours, list(plain))
        for size in self._in_time(name, "decode", list(plain)):
            batch = ours.decode_batch(size, self.context)
            seconds = timed(partial(ours.step, batch), self.device, 2 * self.turns)
            floor = geometry.decode_floor(self.machine, size, self.context, ours.experts_touched(batch))
            add("decode", size, seconds, floor, plain[size] if captured else None)
        for length in self._in_time(name, "prefill", self.prompts):
            seconds = timed(partial(ours.step, ours.prefill_batch(length)), self.device, self.turns)
            add("prefill", length, seconds, geometry.prefill_floor(self.machine, length))
        if mode is None:
            self._compare(ours)

    def _capture(self, name: str, ours: Ours, sizes: Sequence[int]) -> bool:
        """Where graphs cannot be, steps are measured without."""
        try:
            return ours.capture(sizes)
        except RuntimeError as error:
            self.sound = False
            self.report.failed(f"{name}: capturing graphs", error)
            return False

    def theirs(self, weights: MixtralWeights) -> None:
        """The fastest of transformers' ways, and which it was."""
        self.allowance.begin()
        theirs = Theirs(self.config, self.device, weights)
        self._their_logits = theirs.logits(min(self.prompts))
        for size in self._in_time(THEIRS, "decode", self.batches):
            self._fastest("decode", size, partial(theirs.decode_ways, size, self.context), self.turns)
        for length in self._in_time(THEIRS, "prefill", self.prompts):
            self._fastest("prefill", length, partial(theirs.prefill_ways, length), max(1, self.turns // 3))

    def _fastest(self, work: str, size: int, ways: Callable[[], Ways], turns: int) -> None:
        """One for which there is no memory is no way."""
        found: list[tuple[float, str]] = []
        try:
            for way, step in ways().items():
                found.append((timed(step, self.device, turns), way))
        except torch.OutOfMemoryError as error:
            self.report.failed(f"{THEIRS} {work} {size}", error)
        if found:
            seconds, way = min(found)
            self.report.add(Line(THEIRS, work, size, seconds, way=way))

    def _compare(self, ours: Ours) -> None:
        if self._their_logits is not None:
            length = min(self.prompts)
            off = (ours.logits(length) - self._their_logits).norm() / self._their_logits.norm()
            self.report.add(f"# bfloat16: logits after {length} tokens are {100 * float(off):.1f} % off {THEIRS}'")

    def _in_time(self, name: str, work: str, sizes: Sequence[int]) -> Iterator[int]:
        """Those that there is time for."""
        for place, size in enumerate(sizes):
            if self.allowance.used_up:
                self.report.add(f"# {name}: no time for {work} {', '.join(map(str, sizes[place:]))}")
                return
            yield size


def described(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    python = platform.python_version()
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, Python {python}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=SIZES, default="8x7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", default="bfloat16,fp8,int4,nf4", help="of weights, by commas")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--prompts", default="512,1024,2048,4096,8192")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each text in a decode step")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--within", type=float, default=260.0, help="seconds for all of it")
    parser.add_argument("--page-size", type=int, default=16, help="256: read by flash-attn, where it is installed")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--out", type=Path, help="directory for the table and the picture")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # and the picture is drawn on the way out
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    modes = [None if name == "bfloat16" else cast(Mode, name) for name in args.modes.split(",")]
    allowance = Allowance(args.within, len(modes) + (None in modes and not args.alone))
    device = torch.device(args.device)
    config = MixtralConfig.from_dict({"model_type": "mixtral"} | SIZES[args.geometry], "the bench's geometry")
    batches, prompts = ([int(size) for size in text.split(",")] for text in (args.batches, args.prompts))
    report = Report(args.out)
    report.add(f"Mixtral {args.geometry}, contexts of {args.context} tokens. {described(device)}")
    machine = Machine.measured(device, small=args.geometry == "tiny")
    products = f"{DTYPE} products do {machine.speed / 1e12:.1f}, of fp8 {machine.fp8_speed / 1e12:.1f} TFLOP/s"
    report.add(f"copies move {machine.bandwidth / 1e12:.3f} TB/s, {products}")
    report.add(HEADER)
    bench = Bench(
        config, device, machine, batches, prompts, args.context, args.turns, args.page_size, report, allowance
    )
    bench.run(modes, alone=args.alone)
    if not bench.sound:
        sys.exit(1)


if __name__ == "__main__":
    main()
