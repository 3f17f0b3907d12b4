"""Full-size Mixtral on one GPU: decode and prefill beside their floors and beside transformers, one table, one picture.

    python -m tests.bench.bench_gpu [--out docs/gpu]          Mixtral 8x7B; no download, no network, no ray
    python -m tests.bench.bench_gpu --geometry tiny --device cpu      whether the bench itself works
    python -m tests.bench.bench_gpu --draw docs/gpu                   the picture of a table that is there already

Weights are random and made on the device. Floors are of this machine, measured in this process: bytes that a step must
read at the rate of a large copy, operations at the rate of a large product. A decode step is what a server waits for:
from the batch on the host to the next tokens on the host. Each row is printed and written as soon as it is measured, so
a run that is cut short keeps what it has, and a side that fails costs its own rows only.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
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
THEIRS = "transformers"
THEIR_BATCHES = (1, 8, 32)
HEADER = (
    f"{'weights':<13}{'work':<9}{'size':>6}{'ms':>10}{'tokens/s':>11}{'floor ms':>10}{'of floor':>10}"
    f"{'no graph ms':>13}{'theirs':>10} {'':<11}{'ratio':>6}"
)


@dataclass(frozen=True)
class Line:
    """One row of the table. `seconds` of one step, or of one prompt."""

    weights: str  # or THEIRS
    work: str
    size: int  # texts of a decode step, or tokens of a prompt
    seconds: float
    floor: float | None = None
    without_graph: float | None = None
    way: str = ""  # of computing experts
    theirs: Line | None = None

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.size / self.seconds

    def __str__(self) -> str:
        row = f"{self.weights:<13}{self.work:<9}{self.size:>6}{1e3 * self.seconds:>10.2f}{self.speed:>11.0f}"
        row += f"{1e3 * self.floor:>10.2f}{100 * self.floor / self.seconds:>8.0f} %" if self.floor else f"{'':>20}"
        row += f"{1e3 * self.without_graph:>13.2f}" if self.without_graph else f"{'':>13}"
        if self.theirs is None:
            return f"{row}{'':>10} {self.way}".rstrip()
        return f"{row}{self.theirs.speed:>10.0f} {self.theirs.way:<11}{self.theirs.seconds / self.seconds:>6.2f}"


def lines_of(table: str) -> list[Line]:
    """What a picture needs of a table's rows."""
    rows = [row.split() for row in table.splitlines()]
    return [
        Line(weights, work, int(size), float(ms) / 1e3, None if weights == THEIRS else float(rest[1]) / 1e3)
        for weights, work, size, ms, *rest in (row for row in rows if row[1:2] in (["decode"], ["prefill"]))
    ]


class Report:
    """The table as it grows, printed, and kept in a directory if there is one for it."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self.lines: list[Line] = []
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "speed.txt").write_text("")

    def add(self, line: Line | str) -> None:
        print(line, flush=True)
        if isinstance(line, Line):
            self.lines.append(line)
        if self._directory is not None:
            with (self._directory / "speed.txt").open("a") as file:
                file.write(f"{line}\n")

    def draw(self) -> None:
        if self._directory is not None:
            draw(self.lines, self._directory / "speed.png")


@dataclass(frozen=True)
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

    def ours(self, mode: Mode | None) -> None:
        geometry, name = Geometry(self.config, mode), mode or "bfloat16"
        theirs = {(line.work, line.size): line for line in self.report.lines if line.weights == THEIRS}
        room = max(self.context, -(-max(self.prompts) // max(self.batches)))
        ours = Ours(self.config, self.device, mode, max_batch=max(self.batches), room=room, page_size=self.page_size)
        self.report.add(f"# {name}: weights take {ours.weight_bytes / 1e9:.1f} GB")
        batches = {size: ours.decode_batch(size, self.context) for size in self.batches}
        plain = {size: timed(partial(ours.step, batch), self.device, self.turns) for size, batch in batches.items()}
        touched = {size: ours.experts_touched(batch) for size, batch in batches.items()}
        ours.capture(self.batches)

        def add(work: str, size: int, seconds: float, floor: float, without_graph: float | None = None) -> None:
            beside = theirs.get((work, size)) if mode is None else None
            self.report.add(Line(name, work, size, seconds, floor, without_graph, theirs=beside))

        for size, batch in batches.items():
            seconds = timed(partial(ours.step, batch), self.device, 2 * self.turns)
            floor = geometry.decode_floor(self.machine, size, self.context, touched[size])
            add("decode", size, seconds, floor, plain[size])
        for length in self.prompts:
            seconds = timed(partial(ours.step, ours.prefill_batch(length)), self.device, self.turns)
            add("prefill", length, seconds, geometry.prefill_floor(self.machine, length))

    def theirs(self) -> None:
        """The fastest of transformers' ways, and which it was."""
        theirs = Theirs(self.config, self.device)

        def add(work: str, size: int, found: dict[str, float]) -> None:
            seconds, way = min((time, way) for way, time in found.items())
            self.report.add(Line(THEIRS, work, size, seconds, way=way))

        for size in self.batches:
            if size in THEIR_BATCHES:
                add("decode", size, theirs.decode_seconds(size, self.context, self.turns))
        for length in self.prompts:
            add("prefill", length, theirs.prefill_seconds(length, max(1, self.turns // 3)))


def all_measured(sides: Mapping[str, Callable[[], None]], report: Report, device: torch.device) -> bool:
    """One after another. Whichever fails says why, and the next has its turn."""
    failed = False
    for name, measure in sides.items():
        forget(device)
        try:
            measure()
        except Exception as error:
            failed = True
            traceback.print_exc()
            reason = str(error).partition("\n")[0]
            report.add(f"# {name} failed: {type(error).__name__}: {reason}")
        report.draw()
    return not failed


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
    """Tokens per second over sizes, with floors dashed. Without matplotlib there is no picture yet."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed here; --draw makes it from the table elsewhere")
        return
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, work, label in zip(
        figure.subplots(1, 2), ("decode", "prefill"), ("texts", "tokens of the prompt"), strict=True
    ):
        for weights in dict.fromkeys(line.weights for line in lines if line.work == work):
            some = [line for line in lines if (line.weights, line.work) == (weights, work)]
            style = "s:k" if weights == THEIRS else "o-"
            [curve] = axes.plot([line.size for line in some], [line.speed for line in some], style, label=weights)
            floors = [(line.size, line.size / line.floor) for line in some if line.floor]
            if floors:
                axes.plot(*zip(*floors, strict=True), "--", color=curve.get_color(), alpha=0.5)
        if not axes.lines:
            continue  # nothing is measured yet, and an empty plot has no logarithms
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
    parser.add_argument("--page-size", type=int, default=16, help="256: read by flash-attn, where it is installed")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--out", type=Path, help="directory for the table and the picture")
    parser.add_argument(
        "--draw", type=Path, metavar="DIRECTORY", help="measure nothing: draw the table that lies there"
    )
    args = parser.parse_args()
    if args.draw:
        draw(lines_of((args.draw / "speed.txt").read_text()), args.draw / "speed.png")
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(args.device)
    config = MixtralConfig.from_dict({"model_type": "mixtral"} | SIZES[args.geometry], "the bench's geometry")
    machine = Machine.measured(device, small=args.geometry == "tiny")
    batches, prompts = ([int(size) for size in text.split(",")] for text in (args.batches, args.prompts))
    report = Report(args.out)
    report.add(f"Mixtral {args.geometry}, contexts of {args.context} tokens. {described(device)}")
    products = f"{DTYPE} products do {machine.speed / 1e12:.1f}, of fp8 {machine.fp8_speed / 1e12:.1f} TFLOP/s"
    report.add(f"copies move {machine.bandwidth / 1e12:.3f} TB/s, {products}")
    report.add(HEADER)
    bench = Bench(config, device, machine, batches, prompts, args.context, args.turns, args.page_size, report)
    sides = {} if args.alone else {THEIRS: bench.theirs}
    for name in args.modes.split(","):
        sides[name] = partial(bench.ours, None if name == "bfloat16" else cast(Mode, name))
    if not all_measured(sides, report, device):
        sys.exit(1)


if __name__ == "__main__":
    main()
