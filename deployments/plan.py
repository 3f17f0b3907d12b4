"""`mixtral-serve plan`: layouts for given GPUs, checkpoint, quantization and context, before anything is started.

    replicas x tensor x data, experts   what each GPU holds   what a replica holds   step-time floors   which to choose

Talks to people; the arithmetic is cluster/layouts.py's. Figures of cards are their data sheets'.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from cluster.config import Dtype, EngineConfig, KVConfig, SchedulerConfig
from cluster.footprint import matrix_bytes
from cluster.layouts import PREFILL_TOKENS, Estimate, Layout, Workload, estimates, recommend
from cluster.step_floor import Hardware
from deployments.settings import Scheduler, SettingsError
from model.config import MixtralConfig, load_config
from model.errors import ModelError
from model.quantized_slices import loading_mode
from model.shard import Shard

GIB = 1 << 30
NVLINK_3, NVLINK_4, NVLINK_5, PCIE_4 = 300e9, 450e9, 900e9, 32e9  # bytes a second, one direction
CARDS = {
    "a100-40": Hardware("A100 40 GB", 40 * GIB, 1.555e12, 312e12, NVLINK_3),
    "a100-80": Hardware("A100 80 GB", 80 * GIB, 2.039e12, 312e12, NVLINK_3),
    "b200": Hardware("B200", 180 * GIB, 8.0e12, 2.25e15, NVLINK_5),
    "h100": Hardware("H100 SXM", 80 * GIB, 3.35e12, 989e12, NVLINK_4),
    "h200": Hardware("H200", 141_000_000_000, 4.8e12, 989e12, NVLINK_4),
    "l40s": Hardware("L40S", 48 * GIB, 0.864e12, 362e12, PCIE_4, link_latency=20e-6),
    "rtx4090": Hardware("RTX 4090", 24 * GIB, 1.008e12, 165e12, PCIE_4, link_latency=20e-6),
}
GEOMETRIES: dict[str, dict[str, int]] = {
    "8x7b": {"max_position_embeddings": 32768},  # and what else config.json leaves out is Mixtral 8x7B's
    "8x22b": {
        "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
        "num_attention_heads": 48, "num_key_value_heads": 8, "max_position_embeddings": 65536,
    },
}  # fmt: skip
ITEMSIZE: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_DEVICES = 1024

HELP = """\
Compare the layouts of a number of GPUs: what each holds, and how fast it could be at best.

  mixtral-serve plan 8x7b --gpus 8 --gpu h100 --context 32768
  mixtral-serve plan ~/models/mixtral --gpus 1 --gpu l40s --quantization int4

MODEL is a checkpoint directory, demo, or a published geometry (8x7b, 8x22b): no weights are read. Floors are what
memory bandwidth, arithmetic and links allow at the least, by the cards' data sheets; a real step takes longer.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="layouts, memory and step-time floors for given GPUs",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, demo, 8x7b or 8x22b")
    parser.add_argument("--gpus", type=_devices, default=1, metavar="N", help="GPUs in all (default: 1)")
    parser.add_argument("--gpu", choices=sorted(CARDS), default="h100", help="which card (default: h100)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of one card, if it is another")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of its memory")
    parser.add_argument("--link", type=float, metavar="GB/s", help="to the other cards, in one direction")
    parser.add_argument("--context", type=_count, metavar="TOKENS", help="of each request (default: the model's own)")
    parser.add_argument("--quantization", choices=["none", "int8", "int4", "nf4", "fp8"], default="none")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")


def run(options: argparse.Namespace) -> int:
    model = _model(options.model)
    context = options.context or model.max_position_embeddings
    if context > model.max_position_embeddings:
        raise SettingsError(f"--context {context} is more than the model's own, {model.max_position_embeddings}.")
    hardware = _hardware(options)
    scheduler = Scheduler()
    config = EngineConfig(
        model_path=options.model,
        device="cuda",
        dtype=options.dtype,
        max_model_len=context,
        kv=KVConfig(),
        scheduler=SchedulerConfig(scheduler.max_running, scheduler.max_step_tokens, scheduler.max_waiting),
    )
    found = estimates(model, options.gpus, hardware, config, _workload(options, model, context))
    if not found:
        raise SettingsError(f"no layout of {options.gpus} GPUs divides the model's heads; use another number.")
    print(report(found, hardware, context))
    return 0 if any(not each.lacks for each in found) else 1


def report(found: list[Estimate], hardware: Hardware, context: int) -> str:
    fitting = sorted((each for each in found if not each.lacks), key=lambda each: -each.tokens_per_s)
    if not fitting:
        nearest = min(found, key=lambda each: each.lacks)
        return (
            f"Nothing fits: even {name(nearest.layout)} lacks {_gib(nearest.lacks)} on each {hardware.name}. "
            "Use more or larger GPUs, a quantization, or a smaller --context."
        )
    rows: list[tuple[str, ...]] = [
        ("layout", "weights", "KV tokens", "requests", "1 request", "all of them", "all replicas", "prompt of"),
        ("", "a GPU", "a replica", f"of {context}", "ms/token", "ms/step", "tokens/s", f"{PREFILL_TOKENS}, ms"),
    ]
    rows += [_row(each) for each in fitting]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    unfit = [name(each.layout) for each in found if each.lacks]
    if unfit:
        lines += ["", f"Too large for a {hardware.name}: {', '.join(unfit)}."]
    best = recommend(fitting)
    lines += [
        "",
        f"Lowest latency      {name(best.latency.layout)}",
        f"Highest throughput  {name(best.throughput.layout)}",
        f"Least lost at once  {name(best.failure.layout)}: one GPU dies, "
        f"{best.failure.layout.lost_with_one:.0%} of the capacity pauses",
        "",
        "In serve_config.yaml, for the highest throughput:",
        _yaml(best.throughput.layout),
        "",
        "Times are floors: no layout is quicker than its own, and all are slower.",
    ]
    return "\n".join(lines)


def name(layout: Layout) -> str:
    parallel = layout.parallel
    parts = [f"{layout.replicas} x"] if layout.replicas > 1 else []
    parts.append(f"tensor {parallel.tensor}")
    if parallel.data > 1:
        parts.append(f"data {parallel.data}")
    if parallel.ranks > 1:
        parts.append("experts cut" if parallel.expert_slices > 1 else "experts whole")
    return " ".join(parts)


def _row(each: Estimate) -> tuple[str, ...]:
    return (
        name(each.layout),
        _gib(each.footprint.weights),
        f"{each.kv_tokens:,}",
        str(each.sequences),
        f"{each.one_s * 1e3:.1f}",
        f"{each.full_s * 1e3:.1f}",
        f"{each.tokens_per_s:,.0f}",
        f"{each.prefill_s * 1e3:.0f}",
    )


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _yaml(layout: Layout) -> str:
    parallel = layout.parallel
    lines = ["  parallel:", f"    tensor: {parallel.tensor}"]
    if parallel.data > 1:
        lines.append(f"    data: {parallel.data}")
    if parallel.expert_slices > 1:
        lines.append(f"    expert: {parallel.expert}")
    if layout.replicas > 1:
        lines.append(f"  autoscaling: {{min_replicas: {layout.replicas}, max_replicas: {layout.replicas}}}")
    return "\n".join(lines)


def _model(text: str) -> MixtralConfig:
    try:
        if text.lower() in GEOMETRIES:
            return MixtralConfig.from_dict(GEOMETRIES[text.lower()], text)
        if text == "demo":
            return load_config(Path(__file__).parents[1] / "model" / "demo")
        directory = Path(text).expanduser()
        if not directory.is_dir():
            known = f"demo, {' or '.join(GEOMETRIES)}"
            raise SettingsError(f"model: {text} is not a directory here; give that of a checkpoint, {known}.")
        return load_config(directory)
    except ModelError as error:
        raise SettingsError(f"model: {error}.") from None


def _workload(options: argparse.Namespace, model: MixtralConfig, context: int) -> Workload:
    itemsize, mode = ITEMSIZE[options.dtype], None if options.quantization == "none" else options.quantization
    try:
        loading_mode(model, Shard(), mode)
    except ModelError as error:
        raise SettingsError(f"--quantization: {error}.") from None
    if model.quantization is not None:
        mode = model.quantization.mode
    return Workload(context, itemsize, matrix_bytes(mode, itemsize))


def _hardware(options: argparse.Namespace) -> Hardware:
    card = CARDS[options.gpu]
    if options.memory is not None:
        card = replace(card, memory=int(options.memory * GIB))
    if options.bandwidth is not None:
        card = replace(card, bandwidth=options.bandwidth * 1e9)
    if options.link is not None:
        card = replace(card, link=options.link * 1e9)
    return card


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1 << 24):
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return int(text)


def _devices(text: str) -> int:
    if _count(text) > MAX_DEVICES:
        raise argparse.ArgumentTypeError(f"{text} is more than {MAX_DEVICES}")
    return int(text)
