"""Who may import whom: the table of docs/architecture.md, held against every import statement of the packages."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("model", "cluster", "deployments")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FORBIDDEN = {
    "model": {"ray", "fastapi", "starlette", "cluster", "deployments", "torch.distributed"},
    "cluster": {"fastapi", "starlette", "deployments"},
    "deployments": set(),
}
ONLY_IN = {
    "ray": {
        "cluster/worker_group.py",
        "cluster/ray_rank.py",
        "cluster/ray_standby.py",
        "cluster/ray_step.py",
        "deployments/app.py",
        "deployments/cli.py",
        "deployments/ingress.py",
        "deployments/local_ray.py",
        "deployments/ray_metrics.py",
    },
    "torch.distributed": {"cluster/process_group.py", "cluster/transport"},
}
WITHOUT_TORCH = {
    "cluster/commands.py",
    "cluster/crash_bundle.py",
    "cluster/heartbeat.py",
    "cluster/proofs.py",
    "cluster/rebalancing.py",
    "cluster/step_clock.py",
    "cluster/step_line.py",
    "cluster/suspects.py",
    "cluster/messages.py",
    "cluster/scheduler.py",
    "cluster/kv_pool.py",
    "cluster/expert_load.py",
    "cluster/graph_ladder.py",
    "cluster/admission.py",
    "cluster/data_group.py",
    "cluster/placement.py",
    "cluster/results.py",
    "cluster/config.py",
    "cluster/memory.py",
    "cluster/exchange_rule.py",
    "cluster/errors.py",
    "cluster/sequence.py",
    "cluster/waiting.py",
}
# The command line answers, and a replica starts, without what takes a second and 200 MB to import. A rank needs it.
START_WITHOUT_TORCH = ("deployments/cli.py", "deployments/ingress.py")
# Imported where used, so that everything imports everywhere.
INSIDE_FUNCTIONS = {"ray", "triton", "flash_attn", "model.kernels"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Every module a file imports: `from torch import distributed` counts as torch.distributed."""
    tree = parsed(path)
    for node in tree.body if top_level_only else ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                module = node.module or ""
                yield module
                yield from (f"{module}.{alias.name}" for alias in node.names)


def uses(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_package_may(path: Path) -> None:
    where = str(path)
    for module in imports(path):
        assert not uses(module, FORBIDDEN[path.parts[0]]), f"{where} imports {module}"
        for name, allowed in ONLY_IN.items():
            assert where in allowed or str(path.parent) in allowed or not uses(module, {name}), (
                f"{where} imports {module}"
            )
        if where in WITHOUT_TORCH:
            assert not uses(module, {"torch", "numpy", "model"}), f"{where} imports {module}"
    if path.parts[0] != "deployments" and path.parent != Path("model/kernels"):
        for module in imports(path, top_level_only=True):
            assert not uses(module, INSIDE_FUNCTIONS), f"{where} imports {module} at the top"


@pytest.mark.parametrize("start", START_WITHOUT_TORCH)
def test_who_only_asks_ranks_does_not_import_torch(start: str) -> None:
    seen: set[Path] = set()
    waiting = [(start,)]
    while waiting:
        way = waiting.pop()
        for module in imports(Path(way[-1]), top_level_only=True):
            assert not uses(module, {"torch"}), " imports ".join([*way, module])
            path = Path(*module.split(".")).with_suffix(".py")
            if path in FILES and path not in seen:
                seen.add(path)
                waiting.append((*way, str(path)))
    assert Path("cluster/ray_rank.py") in seen or start == "deployments/cli.py"


def test_init_files_are_empty() -> None:
    assert [str(p) for p in FILES if p.name == "__init__.py" and (ROOT / p).read_text()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_ours(package: str) -> None:
    """Top-level names as plain as these could be somebody else's."""
    module = importlib.import_module(package)
    assert Path(str(module.__file__)).parent == ROOT / package
