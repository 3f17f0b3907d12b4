"""What `make gpu-report` runs, on a machine that has what it asks for and no more: no ray, none of our libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from tests.bench.bench_gpu import THEIRS, Line, Report, all_measured, lines_of

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
def report(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What a run says there, and the table it leaves. Tests are found, not run: here may be a GPU."""
    directory = tmp_path_factory.mktemp("report")
    sizes = ("--batches=1,2", "--prompts=8", "--context=16", "--turns=1", "--modes=bfloat16,int4")
    options = ("--geometry=tiny", "--device=cpu", *sizes, f"--out={directory}")
    environment = {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-c", BOTH, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, (directory / "speed.txt").read_text()


def test_tests_are_found_there(report: tuple[str, str]) -> None:
    assert (
        set(re.findall(r"(test_\w+\.py)::", report[0]))
        >= {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")} - NEED_MORE
    )


def test_the_bench_measures_there(report: tuple[str, str]) -> None:
    said, table = report
    assert set(table.splitlines()) <= set(said.splitlines())
    rows = {tuple(line.split()[:3]) for line in table.splitlines()}
    for weights, batches in (("transformers", "1"), ("bfloat16", "12"), ("int4", "12")):
        assert rows >= {(weights, "prefill", "8")} | {(weights, "decode", size) for size in batches}


def test_a_row_is_kept_as_soon_as_it_is_known(tmp_path: Path) -> None:
    report = Report(tmp_path)
    for size in (1, 2):
        report.add(Line("bfloat16", "decode", size, 0.5))
        assert len((tmp_path / "speed.txt").read_text().splitlines()) == size


def test_a_table_can_be_drawn_elsewhere(tmp_path: Path) -> None:
    report = Report(tmp_path)
    theirs = Line(THEIRS, "decode", 32, 0.05, way="eager")
    ours = Line("bfloat16", "decode", 32, 0.025, 0.02, 0.03, theirs=theirs)
    for line in (
        "a heading",
        theirs,
        ours,
        "# fp8 failed: RuntimeError: no such kernel",
        Line("int4", "prefill", 8, 2, 1),
    ):
        report.add(line)
    drawn = lines_of((tmp_path / "speed.txt").read_text())
    points = [(line.weights, line.work, line.size, line.seconds, line.floor) for line in drawn]
    assert points == [(line.weights, line.work, line.size, line.seconds, line.floor) for line in report.lines]


def test_a_side_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    report = Report(tmp_path)

    def fail() -> None:
        raise RuntimeError("no such kernel\nmore of it")

    sides = {"fp8": fail, "int4": lambda: report.add(Line("int4", "decode", 1, 0.5))}
    assert not all_measured(sides, report, CPU)
    failed, measured = (tmp_path / "speed.txt").read_text().splitlines()
    assert failed == "# fp8 failed: RuntimeError: no such kernel"
    assert measured.startswith("int4")
