"""From what an operator wrote to what runs: every auto decided once, from the checkpoint and the machine.

    Settings ──resolve(machine)──▶ Resolved: settings without autos, the engine's part of them, and the reasons

An impossible layout is refused here, before any weight is read. Knows no ray: who knows the cluster says
what the machine has.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from cluster.config import Device, Dtype, EngineConfig, KVConfig, ParallelConfig, Quantization, SchedulerConfig
from deployments.layout import Machine, check_model, check_room
from deployments.settings import Settings, SettingsError
from model.config import Architecture, MixtralConfig, load_config
from model.errors import ModelError
from model.quantized_slices import loading_mode
from model.shard import Shard

DEMO = "demo"
DEMO_NAME = "mixtral-demo"

_TASKS: dict[Architecture, Literal["generate", "classify", "token_classify", "question_answering"]] = {
    "MixtralForCausalLM": "generate",
    "MixtralForSequenceClassification": "classify",
    "MixtralForTokenClassification": "token_classify",
    "MixtralForQuestionAnswering": "question_answering",
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a replica is made from. Pickled into the Serve application; holds no secret."""

    settings: Settings
    engine: EngineConfig
    reasons: Mapping[str, str] = field(default_factory=dict)  # path of a field that was decided here -> why
    fingerprint: str = ""  # of all that decides which tokens a seed gives: the checkpoint, and how it is computed

    @property
    def model_names(self) -> list[str]:
        names = self.settings.served_model_name
        assert isinstance(names, list)
        return names

    def config(self) -> dict[str, Any]:
        """What /health shows. Where keys are kept is nobody's business."""
        return self.settings.model_dump(exclude={"auth"}) | {"threads_per_rank": self.engine.parallel.threads_per_rank}

    def table(self) -> str:
        rows = [(path, _yaml(value), self.reasons.get(path, "")) for path, value in _flat(self.config())]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(
            f"  {path:<{widths[0]}}  {value:<{widths[1]}}  {why}".rstrip() for path, value, why in sorted(rows)
        )


def resolve(settings: Settings, machine: Machine) -> Resolved:
    directory = _directory(settings.model)
    try:
        checkpoint = load_config(directory)
    except ModelError as error:
        raise SettingsError(f"model: {error}.") from None
    check_model(settings.parallel, checkpoint)
    reasons: dict[str, str] = {}
    device = _device(settings, machine, reasons)
    dtype = _dtype(settings, checkpoint, device, reasons)
    quantization = _quantization(settings, checkpoint, reasons)
    cpus_per_rank, threads = _cpus(settings, machine, device, reasons)
    _check_length(settings, checkpoint)
    ranks = settings.parallel.tensor * settings.parallel.data
    settings = settings.model_copy(
        update={
            "model": str(directory),
            "served_model_name": _names(settings, directory),
            "device": device,
            "dtype": dtype,
            "quantization": quantization,
            "task": _task(settings, checkpoint, reasons),
            "parallel": settings.parallel.model_copy(
                update={"expert": settings.parallel.expert or ranks, "cpus_per_rank": cpus_per_rank}
            ),
        }
    )
    engine = _engine_config(settings, device, dtype, cpus_per_rank, threads)
    check_room(engine.parallel, device, machine)
    return Resolved(settings, engine, reasons, _fingerprint(settings, directory))


def _engine_config(
    settings: Settings, device: Device, dtype: Dtype, cpus_per_rank: float, threads: int
) -> EngineConfig:
    cache, scheduler, parallel = settings.kv_cache, settings.scheduler, settings.parallel
    return EngineConfig(
        model_path=settings.model,
        device=device,
        dtype=dtype,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        parallel=ParallelConfig(
            tensor=parallel.tensor,
            data=parallel.data,
            expert=parallel.expert,
            exchange=parallel.exchange,
            spare_slots=parallel.spare_slots,
            standby=parallel.standby,
            threads_per_rank=threads,
            cpus_per_rank=cpus_per_rank,
        ),
        kv=KVConfig(cache.page_size, cache.memory, cache.prefix_caching),
        scheduler=SchedulerConfig(scheduler.max_running, scheduler.max_step_tokens, scheduler.max_waiting),
    )


def _directory(model: str) -> Path:
    if model == DEMO:
        return Path(str(importlib.resources.files("model"))) / "demo"
    directory = Path(model).expanduser().absolute()
    if not directory.is_dir():
        raise SettingsError(
            f"model: {model} is not a directory here; give the path of a checkpoint directory "
            f"(nothing is downloaded), or {DEMO}."
        )
    return directory


def _task(settings: Settings, checkpoint: MixtralConfig, reasons: dict[str, str]) -> str:
    own = _TASKS[checkpoint.architecture]
    if settings.task == "auto":
        reasons["task"] = f"auto: {checkpoint.architecture}"
        return own
    possible = [own, "embed"] if own == "generate" else [own]  # a classifier's head is all that its ranks give
    if settings.task not in possible:
        raise SettingsError(
            f"task: {settings.task} is not what this checkpoint was made for; use {' or '.join(['auto', *possible])}."
        )
    return settings.task


def _fingerprint(settings: Settings, directory: Path) -> str:
    """Without reading the weights: another checkpoint has another config, or files of other names and sizes."""
    computed = {name: getattr(settings, name) for name in ("device", "dtype", "quantization")}
    computed |= {name: getattr(settings.parallel, name) for name in ("tensor", "data", "expert", "exchange")}
    digest = sha256(repr(computed).encode())
    for path in sorted(directory.iterdir()):
        if path.name in ("config.json", "params.json"):
            digest.update(path.read_bytes())
        elif path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return f"fp_{digest.hexdigest()[:12]}"


def _names(settings: Settings, directory: Path) -> list[str]:
    names = settings.served_model_name
    if names is None:
        return [DEMO_NAME if settings.model == DEMO else directory.name]
    names = [names] if isinstance(names, str) else names
    if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise SettingsError(f"served_model_name: give at least one name, none empty and none twice, not {names}.")
    return names


def _device(settings: Settings, machine: Machine, reasons: dict[str, str]) -> Device:
    if settings.device == "cpu":
        return "cpu"
    if settings.device == "auto":
        reasons["device"] = f"auto: {machine.gpus} GPUs here"
        if machine.gpus == 0:
            return "cpu"
    return "cuda"


def _dtype(settings: Settings, checkpoint: MixtralConfig, device: Device, reasons: dict[str, str]) -> Dtype:
    if settings.dtype != "auto":
        if device == "cpu" and settings.dtype == "float16":
            raise SettingsError("dtype: float16 is many times slower than bfloat16 on a CPU; use bfloat16 or float32.")
        return settings.dtype
    if settings.model == DEMO:
        reasons["dtype"] = "auto: the demo model is small enough to be exact"
        return "float32"
    if checkpoint.dtype is None:
        reasons["dtype"] = "auto: the checkpoint does not say"
        return "float32" if device == "cpu" else "bfloat16"
    if device == "cpu" and checkpoint.dtype == "float16":
        reasons["dtype"] = "auto: the checkpoint's float16 is slow on a CPU"
        return "bfloat16"
    reasons["dtype"] = "auto: the checkpoint's"
    return checkpoint.dtype


def _quantization(settings: Settings, checkpoint: MixtralConfig, reasons: dict[str, str]) -> Quantization:
    """What weights are in: what they were saved in, or what they become as they are read."""
    parallel = settings.parallel
    ranks = parallel.tensor * parallel.data
    shard = Shard(tensor_size=parallel.tensor, expert_slices=ranks // (parallel.expert or ranks))
    wanted = None if settings.quantization == "none" else settings.quantization
    try:
        loading_mode(checkpoint, shard, wanted)
    except ModelError as error:
        raise SettingsError(f"quantization: {error}.") from None
    if checkpoint.quantization is not None:
        reasons["quantization"] = "the checkpoint's"
        return checkpoint.quantization.mode
    return settings.quantization


def _cpus(settings: Settings, machine: Machine, device: Device, reasons: dict[str, str]) -> tuple[float, int]:
    """What each rank asks of Ray, and the torch threads it runs."""
    ranks, cpus = settings.parallel.tensor * settings.parallel.data, settings.parallel.cpus_per_rank
    if cpus is not None:
        return cpus, max(1, int(cpus))
    if device == "cuda":
        reasons["parallel.cpus_per_rank"] = "default: 1 beside each GPU"
        return 1.0, 1
    threads = max(1, machine.cores // ranks)
    reasons["parallel.cpus_per_rank"] = "default: 1 for the replica, divided"
    reasons["threads_per_rank"] = f"cores: {machine.cores}, ranks: {ranks}"
    return math.floor(10_000 / ranks) / 10_000, threads  # Ray counts in steps of 0.0001


def _check_length(settings: Settings, checkpoint: MixtralConfig) -> None:
    longest = checkpoint.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > longest:
        raise SettingsError(f"max_model_len: {settings.max_model_len} is more than the checkpoint's own, {longest}.")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _yaml(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)
