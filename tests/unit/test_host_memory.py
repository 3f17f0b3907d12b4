"""Memory that is left, by the files in which the kernel says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.host_memory import available_bytes


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal:       16000000 kB\nMemFree: 1000 kB\nMemAvailable:    8000000 kB\n")
    return tmp_path


def write_container(cgroup: Path, limit: str, used: int, files: int) -> Path:
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{used}\n")
    (cgroup / "memory.stat").write_text(f"anon 77\ninactive_file {files}\nactive_file 5\n")
    return cgroup


def test_kept_files_are_free(proc: Path) -> None:
    assert available_bytes(proc, proc / "none") == 8_000_000 << 10


def test_a_container_has_less(proc: Path) -> None:
    assert available_bytes(proc, write_container(proc, "1000000", 900_000, 50_000)) == 150_005


def test_a_container_may_be_full(proc: Path) -> None:
    assert available_bytes(proc, write_container(proc, "1000000", 1_200_000, 0)) == 0


def test_a_container_without_a_limit_has_what_the_machine_has(proc: Path) -> None:
    assert available_bytes(proc, write_container(proc, "max", 900_000, 50_000)) == 8_000_000 << 10


def test_this_machine() -> None:
    assert available_bytes() > 1 << 20
