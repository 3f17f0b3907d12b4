"""What `make gpu-report` runs, on a machine that has what it asks for and no more: no ray, none of our libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from tests.bench import bench_gpu, gpu_sides
from tests.bench.bench_gpu import Allowance, Bench
from tests.bench.gpu_table import THEIRS, Line, Report
from tests.bench.picture import COLORS, HEIGHT, PANEL_WIDTH, Curve, Panel, draw

ROOT = Path(__file__).parents[2]
GIVEN = ("torch", "triton", "transformers", "pytest")
NEED_MORE = {"test_engine.py", "test_steps_ahead.py", "test_flash_pages.py"}  # sentencepiece, or flash-attn
CPU = torch.device("cpu")
# One process for both: most of the time goes to importing torch and transformers.
BOTH = """
import sys
import pytest
from tests.bench.bench_gpu import main
found = pytest.main(["-c", "tests/gpu/pytest.ini", "tests/gpu", "--collect-only", "-q", "-p", "no:cacheprovider"])
main()
sys.exit(found)
"""


def distributions(names: tuple[str, ...]) -> list[metadata.Distribution]:
    """These and all that they ask for, themselves or through others."""
    found: dict[str, metadata.Distribution] = {}
    wanted = list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system
        requirements = map(Requirement, found[name].requires or [])
        wanted += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    return list(found.values())


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of packages as pip would fill it, one of which brought its tests under the name of ours."""
    directory = tmp_path_factory.mktemp("packages")
    (directory / "tests").mkdir()
    (directory / "tests" / "__init__.py").touch()
    for distribution in distributions(GIVEN):
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (directory / name).exists():
                (directory / name).symlink_to(str(distribution.locate_file(name)))
    return directory


@pytest.fixture(scope="module")
def report(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, bytes]:
    """What a run says there, and the table and picture it leaves. Tests are found, not run: here may be a GPU."""
    directory = tmp_path_factory.mktemp("report")
    sizes = ("--batches=1,2", "--prompts=8", "--context=16", "--turns=1", "--modes=bfloat16,int4")
    options = ("--geometry=tiny", "--device=cpu", *sizes, f"--out={directory}")
    environment = {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-c", BOTH, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, (directory / "speed.txt").read_text(), (directory / "speed.png").read_bytes()


def test_tests_are_found_there(report: tuple[str, str, bytes]) -> None:
    assert (
        set(re.findall(r"(test_\w+\.py)::", report[0]))
        >= {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")} - NEED_MORE
    )


def test_the_bench_measures_there(report: tuple[str, str, bytes]) -> None:
    said, table, picture = report
    assert set(table.splitlines()) <= set(said.splitlines())
    rows = {tuple(line.split()[:3]) for line in table.splitlines()}
    for weights in (THEIRS, "bfloat16", "int4"):
        assert rows >= {(weights, "prefill", "8"), (weights, "decode", "1"), (weights, "decode", "2")}
    assert colors_of(picture) >= set(COLORS[:3])


def test_both_compute_the_same(report: tuple[str, str, bytes]) -> None:
    [off] = re.findall(r"logits after 8 tokens are ([\d.]+) % off", report[1])
    assert float(off) < 2


def colors_of(png: bytes) -> set[tuple[int, ...]]:
    """Of all pixels; every chunk of the picture is sound."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(png):
        size, name = int.from_bytes(png[at : at + 4]), png[at + 4 : at + 8]
        chunks[name] = content = png[at + 8 : at + 8 + size]
        assert int.from_bytes(png[at + 8 + size : at + 12 + size]) == zlib.crc32(name + content)
        at += size + 12
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4]) for i in (0, 4))
    assert (width, height) == (2 * PANEL_WIDTH, HEIGHT)
    pixels = zlib.decompress(chunks[b"IDAT"])
    assert len(pixels) == height * (1 + 3 * width)
    rows = [pixels[i + 1 : i + 1 + 3 * width] for i in range(0, len(pixels), 1 + 3 * width)]
    return {tuple(row[i : i + 3]) for row in rows for i in range(0, 3 * width, 3)}


def test_a_row_is_kept_as_soon_as_it_is_known(tmp_path: Path) -> None:
    report = Report(tmp_path)
    for size in (1, 2):
        report.add(Line("bfloat16", "decode", size, 0.5))
        assert len((tmp_path / "speed.txt").read_text().splitlines()) == size


def test_pictures_show_the_curves_that_there_are(tmp_path: Path) -> None:
    curves = [
        Curve("one point", [(8, 1000)]),
        Curve("none", []),
        Curve("two", [(1, 5), (256, 1e5)], [(1, 6), (256, 2e5)]),
    ]
    panels = [Panel("decode", "x", "y", curves), Panel("prefill", "x", "y", [])]
    draw("a title with a letter that has no form: ß", panels, tmp_path / "speed.png")
    found = colors_of((tmp_path / "speed.png").read_bytes())
    assert {COLORS[0], COLORS[2], (0, 0, 0)} <= found
    assert COLORS[1] not in found


def bench(directory: Path, **parts: Any) -> Bench:
    settings = {"batches": (1, 2), "prompts": (8, 16), "context": 16, "turns": 1, "page_size": 16}
    allowance = Allowance(60, 1)
    return Bench(**{  # type: ignore[arg-type]
        "config": None, "device": CPU, "machine": None, "report": Report(directory), "allowance": allowance,
    } | settings | parts)  # fmt: skip


def test_a_side_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    some = bench(tmp_path)

    def fail() -> None:
        raise RuntimeError("no such kernel\nmore of it")

    some.guarded("fp8", fail)
    some.guarded("int4", lambda: some.report.add(Line("int4", "decode", 1, 0.5)))
    assert not some.sound
    failed, measured = (tmp_path / "speed.txt").read_text().splitlines()
    assert failed == "# fp8 failed: RuntimeError: no such kernel"
    assert measured.startswith("int4")


def test_who_is_told_to_end_leaves_a_picture(tmp_path: Path) -> None:
    some = bench(tmp_path)

    def end() -> None:
        some.report.add(Line("int4", "decode", 1, 0.5))
        sys.exit("told to end")

    with pytest.raises(SystemExit):
        some.guarded("int4", end)
    assert COLORS[0] in colors_of((tmp_path / "speed.png").read_bytes())


def test_without_graphs_steps_are_measured_all_the_same(tmp_path: Path) -> None:
    def capture(sizes: object) -> bool:
        raise RuntimeError("operation not permitted when stream is capturing")

    some = bench(tmp_path)
    assert not some._capture("bfloat16", SimpleNamespace(capture=capture), [1, 2])  # type: ignore[arg-type]
    assert "capturing graphs failed" in (tmp_path / "speed.txt").read_text()


def test_what_the_first_turn_compiles_takes_no_time_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now, takes = 0.0, iter([100.0, 3.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr(gpu_sides, "perf_counter", lambda: now)

    def work() -> None:
        nonlocal now
        now += next(takes)

    assert gpu_sides.timed(work, CPU, turns=2) == 2.0
    assert gpu_sides.timed(work, CPU, turns=5) == 9.0, "nine seconds are more than it has"


def test_every_side_has_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(bench_gpu, "monotonic", lambda: now)
    allowance = Allowance(90, 3)
    some = bench(tmp_path, allowance=allowance)
    allowance.begin()
    assert list(some._in_time("fp8", "decode", (1, 2))) == [1, 2]
    now = 30.0
    assert list(some._in_time("fp8", "prefill", (8, 16))) == []
    allowance.begin()
    now = 50.0  # it has left ten seconds to the last one
    allowance.begin()
    now = 89.0
    assert not allowance.used_up
    assert (tmp_path / "speed.txt").read_text() == "# fp8: no time for prefill 8, 16\n"
