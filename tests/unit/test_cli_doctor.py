"""The doctor's page: what it says of a good machine, of a poor one, and of one it cannot look into."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deployments import doctor
from deployments.cli import main
from deployments.doctor import Finding, examine, page
from model.native import library


def test_this_machine_runs_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for what in (
        "Python",
        "torch",
        "ray",
        "CPU cores",
        "CPU features",
        "CPU kernels",
        "memory",
        "/dev/shm",
        "GPU",
        "demo model",
    ):
        assert what in text
    assert text.endswith("Ready: mixtral-serve serve\n")


def test_the_page() -> None:
    findings = [Finding("ok", "a", "1"), Finding("bad", "longer", "2", "do " * 60), Finding("note", "b", "3", "maybe")]
    lines = page(findings).splitlines()
    assert lines[0] == "ok    a       1"
    assert lines[1] == "bad   longer  2"
    assert all(len(line) <= 100 for line in lines)
    assert lines[-1] == "Not ready: longer."


def test_what_is_missing_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"torch": "2.4.0+cu121", "ray": None, "mixtral-serve": None}

    def version(name: str) -> str:
        found = versions[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = {finding.what: finding for finding in examine()}
    assert findings["torch"].state == findings["ray"].state == "bad"
    assert "pip install 'torch>=2.11'" in findings["torch"].advice
    assert findings["ray"].found == "not installed"
    assert main(["doctor"]) == 1
    assert "Not ready: torch, ray" in capsys.readouterr().out


def test_without_compiled_kernels_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find", lambda: "not compiled: install a C compiler")
    (finding,) = [finding for finding in examine() if finding.what == "CPU kernels"]
    assert finding.state == "note"
    assert finding.advice == "not compiled: install a C compiler."


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       8000000 kB\nMemAvailable:    1048576 kB\n")
    monkeypatch.setattr(doctor, "_cgroup_limit", lambda: None)
    assert (doctor._memory(meminfo).state, doctor._memory(meminfo).found) == ("bad", "1.0 GiB free")
    meminfo.write_text("MemAvailable:    9437184 kB\n")
    assert doctor._memory(meminfo).state == "ok"
    monkeypatch.setattr(doctor, "_cgroup_limit", lambda: 512 << 20)
    assert doctor._memory(meminfo).found == "512 MiB free"


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    finding = doctor._shared_memory(tmp_path)
    assert (finding.state, finding.found) == ("bad", "64 MiB free")
    assert "--shm-size=2g" in finding.advice


def test_where_there_is_no_such_thing(tmp_path: Path) -> None:
    assert doctor._shared_memory(tmp_path / "none").state == "note"
    assert doctor._demo(tmp_path).state == "note"
    cores, features = doctor._processor(tmp_path / "none")
    assert int(cores.found) >= 1
    assert features.state == "note"


def test_a_modern_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n")
    assert doctor._processor(tmp_path / "cpuinfo")[1] == Finding("ok", "CPU features", "avx2, avx512f, avx512_bf16")


def test_what_kernels_for_gpus_need(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (SimpleNamespace(name="a GPU", total_memory=16 << 30, major=major, minor=5) for major in (7, 8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: (old, new)[index])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    found = {finding.what: finding for finding in doctor._gpus()}
    assert (found["GPU 0"].state, found["GPU 1"].state, found["C compiler"].state) == ("bad", "ok", "bad")
    assert found["GPU 0"].found == "a GPU, 16.0 GiB, compute 7.5"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    states = {finding.what: finding.state for finding in doctor._compilers()}
    assert (states["triton"], states["flash_attn"]) == ("bad", "note")
