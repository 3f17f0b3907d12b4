"""mixtral-serve doctor: one page about this machine: what works, what does not, and what to install or change.

    ok    torch       2.13.0
    note  flash_attn  not installed
          Prompts use torch's kernels: pip install ...
    bad   /dev/shm    64 MiB free
          Ray and ranks on one machine meet there and need 256 MiB: docker run --shm-size=2g ...

Each check looks at one thing and changes nothing. "bad" keeps the server from running; it can run without a "note".
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "bad"]

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
OLDEST_RAY = (2, 60)
SHARED_MEMORY = 256 << 20  # Ray's object store and the ranks' exchange
FREE_MEMORY = 2 << 30  # the demo model beside Ray
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Finding:
    state: State
    what: str
    found: str
    advice: str = ""  # nothing to do where it is empty


def examine() -> list[Finding]:
    return [
        _python(),
        _package("torch", OLDEST_TORCH, required=True),
        _package("ray", OLDEST_RAY, required=True),
        *_processor(Path("/proc/cpuinfo")),
        _kernels(),
        _memory(Path("/proc/meminfo")),
        _shared_memory(Path("/dev/shm")),  # noqa: S108
        *_gpus(),
        _demo(Path(__file__).parents[1] / "model" / "demo"),
    ]


def page(findings: Iterable[Finding]) -> str:
    findings = list(findings)
    widths = [max(len(getattr(finding, column)) for finding in findings) for column in ("what", "found")]
    lines = []
    for each in findings:
        row = f"{each.state:<4}  {each.what:<{widths[0]}}  {each.found:<{widths[1]}}".rstrip()
        lines.append(row)
        if each.advice:
            lines += textwrap.wrap(each.advice, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    bad = [each.what for each in findings if each.state == "bad"]
    verdict = f"Not ready: {', '.join(bad)}." if bad else "Ready: mixtral-serve serve"
    return "\n".join([*lines, "", verdict])


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("bad", "Python", found, "Needs 3.11 or newer: make a virtual environment of a newer one.")
    return Finding("ok", "Python", found)


def _package(name: str, oldest: tuple[int, int], *, required: bool) -> Finding:
    wanted = ".".join(map(str, oldest))
    advice = f"Install {wanted} or newer: pip install '{name}>={wanted}'."
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("bad" if required else "note", name, "not installed", advice)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdecimal())
    return Finding("bad", name, version, advice) if numbers < oldest else Finding("ok", name, version)


def _processor(cpuinfo: Path) -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = set(_value(cpuinfo, "flags").split())
    have = [name for name in CPU_FEATURES if name in flags]
    features = Finding("ok", "CPU features", ", ".join(have) or "none of those that matter")
    if "avx512_bf16" not in flags:
        advice = "No fast bfloat16: on this CPU --set dtype=float32 is often as fast, and exact."
        features = Finding("note", features.what, features.found, advice)
    return [Finding("ok", "CPU cores", str(cores)), features]


def _kernels() -> Finding:
    from model.native.library import find

    found = find()
    if not isinstance(found, str):
        return Finding("ok", "CPU kernels", "compiled, for bfloat16")
    return Finding("note", "CPU kernels", "none: bfloat16 is computed by torch's operators, more slowly", f"{found}.")


def _memory(meminfo: Path) -> Finding:
    available = int((_value(meminfo, "MemAvailable") or "0 kB").split()[0]) << 10
    limit = _cgroup_limit()
    free = available if limit is None else min(available, limit)
    found = f"{_size(free)} free"
    if free < FREE_MEMORY:
        return Finding("bad", "memory", found, f"The demo model and Ray need {_size(FREE_MEMORY)}: end other programs.")
    return Finding("ok", "memory", found, "")


def _cgroup_limit() -> int | None:
    """What a container may still take, where it has a limit."""
    directory = Path("/sys/fs/cgroup")
    try:
        limit, used = ((directory / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no container, no limit ("max"), or an older kernel
        return None


def _shared_memory(directory: Path) -> Finding:
    what = str(directory)
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return Finding("note", what, "not there", "Ranks use gloo instead, which is slower: this is not Linux.")
    if free < SHARED_MEMORY:
        advice = f"Ray and ranks on one machine meet there and need {_size(SHARED_MEMORY)}: "
        return Finding("bad", what, f"{_size(free)} free", advice + "docker run --shm-size=2g, or a memory emptyDir.")
    return Finding("ok", what, f"{_size(free)} free")


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        advice = "" if built else "This torch is built for CPUs; with a GPU, install one built for CUDA."
        return [Finding("note", "GPUs", "none: everything runs on the CPU", advice)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {_size(properties.total_memory)}, compute {properties.major}.{properties.minor}"
        old = properties.major < 8
        advice = "Kernels are for compute 8.0 and later: --set device=cpu." if old else ""
        findings.append(Finding("bad" if old else "ok", f"GPU {index}", found, advice))
    return [*findings, *_compilers()]


def _compilers() -> list[Finding]:
    """Kernels for GPUs are compiled when they are first used."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    flash = "Prompts use torch's kernels: pip install --no-build-isolation 'mixtral-serve[flash]'."
    return [
        _found("triton", _installed("triton"), "bad", "It compiles the kernels: pip install 'mixtral-serve[gpu]'."),
        _found("C compiler", compiler, "bad", "Triton needs one, and Python's headers: gcc and python3-dev."),
        _found("flash_attn", _installed("flash_attn"), "note", flash),
    ]


def _installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) is None else "installed"


def _found(what: str, found: str | None, otherwise: State, advice: str) -> Finding:
    return Finding(otherwise, what, "not there", advice) if found is None else Finding("ok", what, found)


def _demo(directory: Path) -> Finding:
    if (directory / "model.safetensors").is_file():
        return Finding("ok", "demo model", str(directory))
    return Finding("note", "demo model", "not there", "Give --model a checkpoint directory.")


def _value(file: Path, name: str) -> str:
    """Of a `name : value` line of a file in /proc; empty where there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
