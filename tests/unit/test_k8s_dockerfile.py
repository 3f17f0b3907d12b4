"""The image: what can be said of it without building it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "k8s/Dockerfile").read_text()
STAGES = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def stage(name: str) -> str:
    (found,) = [text for text in STAGES if text.splitlines()[0].endswith(f" AS {name}")]
    return found


def test_both_targets_run_as_the_user_that_the_manifests_name() -> None:
    for target in ("cpu", "cuda"):
        assert re.search(r"^USER 1000:1000$", stage(target), re.MULTILINE)
        assert "--uid 1000" in stage(target)
        assert f"COPY --from={target}-wheels /opt/mixtral /opt/mixtral" in stage(target)


def test_everything_that_is_installed_has_a_version() -> None:
    constrained = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for command in re.findall(r"pip install ((?:.*\\\n)*.*)", DOCKERFILE):
        words = command.partition("&&")[0].replace("-c constraints.txt", "").replace("\\\n", " ").split()
        wanted = [word for word in words if not word.startswith("-")]
        assert wanted
        for one in wanted:
            ours = one.strip('"').startswith(".")  # its requirements have versions where constraints.txt is given
            assert ("-c constraints.txt" in command) if ours else ("==" in one or one in constrained), one
    bases = [text.split()[0] for text in STAGES]
    assert all(":" in base and "latest" not in base for base in bases), bases


def test_everything_that_is_copied_is_there() -> None:
    stages = {text.split()[2] for text in STAGES}
    for flags, sources in re.findall(r"^COPY ((?:--\S+ )*)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        if flags:
            assert flags.strip().removeprefix("--from=") in stages
            continue
        for source in sources.split():
            assert (ROOT / source).exists(), source


def test_what_is_compiled_finds_a_compiler_and_nothing_compiled_elsewhere() -> None:
    assert PROJECT["tool"]["setuptools"]["ext-modules"]
    for target in ("cpu-wheels", "cuda-wheels"):
        (installed,) = re.findall(r"apt-get install -y --no-install-recommends (.*?) *(?:\\\n|&&)", stage(target))
        assert {"gcc", "g++"} & set(installed.split()), target
    assert "**/*.so" in (ROOT / "k8s/Dockerfile.dockerignore").read_text().splitlines()


def test_what_is_installed_is_all_of_it() -> None:
    packages = {name.partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    ignored = (ROOT / "k8s/Dockerfile.dockerignore").read_text().splitlines()
    for target in ("cpu-wheels", "cuda-wheels"):
        assert set(re.findall(r"^COPY (\w+) \1$", stage(target), re.MULTILINE)) == packages
    files = {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"]}
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == packages | files


def test_its_python_is_one_that_the_project_runs_on() -> None:
    versions = set(re.findall(r"(?:PYTHON=|python)(3\.\d+)", DOCKERFILE))
    assert len(versions) == 1
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert versions <= {"3.11", "3.12", "3.13"}
