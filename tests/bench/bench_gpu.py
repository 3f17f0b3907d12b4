"""Full-size Mixtral on one GPU: decode and prefill beside their floors and beside transformers, one table, one picture.

    python -m tests.bench.bench_gpu [--out docs/gpu]          Mixtral 8x7B; no download, no network, no ray
    python -m tests.bench.bench_gpu --geometry tiny --device cpu      whether the bench itself works

Weights are random and made on the device. Floors are of this machine, measured in this process: bytes that a step must
read at the rate of a large copy, operations at the rate of a large product. A decode step is what a server waits for:
from the batch on the host to the next tokens on the host.
"""

from __future__ import annotations

import argparse
import gc
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import transformers

from model.config import MixtralConfig
from model.quantization import Mode
from tests.bench.gpu_sides import DTYPE, Geometry, Machine, Ours, Theirs, timed

SIZES = {
    "8x7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
}
THEIR_BATCHES = (1, 8, 32)
HEADER = (
    f"{'weights':<10}{'work':<9}{'size':>6}{'ms':>10}{'tokens/s':>11}{'floor ms':>10}{'of floor':>10}"
    f"{'no graph ms':>13}{'theirs':>10} {'':<11}{'ratio':>6}"
)


@dataclass(frozen=True)
class Line:
    """One row of the table. `seconds` of one step, or of one prompt."""

    weights: str
    work: str
    size: int  # texts of a decode step, or tokens of a prompt
    seconds: float
    floor: float
    without_graph: float | None = None
    theirs: float | None = None
    theirs_name: str = ""

    def __str__(self) -> str:
        row = f"{self.weights:<10}{self.work:<9}{self.size:>6}{1e3 * self.seconds:>10.2f}"
        row += f"{self.size / self.seconds:>11.0f}{1e3 * self.floor:>10.2f}{100 * self.floor / self.seconds:>8.0f} %"
        row += f"{1e3 * self.without_graph:>13.2f}" if self.without_graph else f"{'':>13}"
        if self.theirs is None:
            return row.rstrip()
        return row + f"{self.size / self.theirs:>10.0f} {self.theirs_name:<11}{self.theirs / self.seconds:>6.2f}"


@dataclass(frozen=True)
class Bench:
    config: MixtralConfig
    device: torch.device
    machine: Machine
    batches: Sequence[int]
    prompts: Sequence[int]
    context: int
    turns: int

    def ours(self, mode: Mode | None, theirs: dict[tuple[str, int], tuple[float, str]]) -> Iterator[Line]:
        geometry, name = Geometry(self.config, mode), mode or "bfloat16"
        room = max(self.context, -(-max(self.prompts) // max(self.batches)))
        ours = Ours(self.config, self.device, mode, max_batch=max(self.batches), room=room)
        batches = {size: ours.decode_batch(size, self.context) for size in self.batches}
        plain = {size: timed(partial(ours.step, batch), self.device, self.turns) for size, batch in batches.items()}
        touched = {size: ours.experts_touched(batch) for size, batch in batches.items()}
        ours.capture(self.batches)
        for size, batch in batches.items():
            seconds = timed(partial(ours.step, batch), self.device, 2 * self.turns)
            floor = geometry.decode_floor(self.machine, size, self.context, touched[size])
            other = theirs.get(("decode", size), (None, "")) if mode is None else (None, "")
            yield Line(name, "decode", size, seconds, floor, plain[size], *other)
        for length in self.prompts:
            seconds = timed(partial(ours.step, ours.prefill_batch(length)), self.device, self.turns)
            other = theirs.get(("prefill", length), (None, "")) if mode is None else (None, "")
            yield Line(name, "prefill", length, seconds, geometry.prefill_floor(self.machine, length), None, *other)

    def theirs(self) -> dict[tuple[str, int], tuple[float, str]]:
        """The fastest of transformers' ways, and which it was."""
        theirs = Theirs(self.config, self.device)
        found = {}
        for size in self.batches:
            if size in THEIR_BATCHES:
                seconds = theirs.decode_seconds(size, self.context, self.turns)
                found["decode", size] = min((time, name) for name, time in seconds.items())
        for length in self.prompts:
            seconds = theirs.prefill_seconds(length, max(1, self.turns // 3))
            found["prefill", length] = min((time, name) for name, time in seconds.items())
        return found


def forget(device: torch.device) -> None:
    """What the last side held, before the next needs it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def described(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    python = platform.python_version()
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, Python {python}"


def draw(lines: Sequence[Line], path: Path) -> None:
    """Tokens per second over sizes, with floors dashed. Without matplotlib there is no picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, work, label in zip(
        figure.subplots(1, 2), ("decode", "prefill"), ("texts", "tokens of the prompt"), strict=True
    ):
        for weights in dict.fromkeys(line.weights for line in lines):
            some = [line for line in lines if (line.weights, line.work) == (weights, work)]
            sizes = [line.size for line in some]
            [curve] = axes.plot(sizes, [line.size / line.seconds for line in some], "o-", label=weights)
            axes.plot(sizes, [line.size / line.floor for line in some], "--", color=curve.get_color(), alpha=0.5)
        beside = [line for line in lines if line.theirs and line.work == work]
        speeds = [line.size / line.theirs for line in beside if line.theirs]
        axes.plot([line.size for line in beside], speeds, "s:", color="black", label="transformers")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="tokens per second", title=f"{work} (dashed: floor)")
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=SIZES, default="8x7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", default="bfloat16,fp8,int4,nf4", help="of weights, by commas")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--prompts", default="512,1024,2048,4096,8192")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each text in a decode step")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--out", type=Path, help="directory for the table and the picture")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(args.device)
    config = MixtralConfig.from_dict({"model_type": "mixtral"} | SIZES[args.geometry], "the bench's geometry")
    machine = Machine.measured(device, small=args.geometry == "tiny")
    batches, prompts = ([int(size) for size in text.split(",")] for text in (args.batches, args.prompts))
    bench = Bench(config, device, machine, batches, prompts, args.context, args.turns)
    head = [
        f"Mixtral {args.geometry}, contexts of {args.context} tokens. {described(device)}",
        f"copies move {machine.bandwidth / 1e12:.3f} TB/s, {DTYPE} products do {machine.speed / 1e12:.1f} TFLOP/s",
        HEADER,
    ]
    print(*head, sep="\n", flush=True)
    theirs = {} if args.alone else bench.theirs()
    lines: list[Line] = []
    for name in args.modes.split(","):
        forget(device)
        for line in bench.ours(None if name == "bfloat16" else cast(Mode, name), theirs):
            print(line, flush=True)
            lines.append(line)
        if args.out is not None:  # after each mode: what was measured stays, whatever happens to the next
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "speed.txt").write_text("\n".join([*head, *map(str, lines)]) + "\n")
            draw(lines, args.out / "speed.png")


if __name__ == "__main__":
    main()
