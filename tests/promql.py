"""What tests of metrics share: Prometheus's own tool, and panels' queries as Grafana would send them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from k8s.dashboards.generate import OBJECTIVES
from k8s.dashboards.panels import Query

RATE_INTERVAL = "20s"


def expression(query: Query) -> str:
    """With every variable at what Grafana begins with."""
    text = query.expression.replace("$__rate_interval", RATE_INTERVAL).replace('"$layer"', '"0"')
    for name, (_, _, default) in OBJECTIVES.items():
        text = text.replace(f"${name}", default)
    return re.sub(r"\$(model|replica|rank)", ".*", text)


def promtool(directory: Path, *arguments: str) -> None:
    """It finds nothing wrong with what lies in the directory."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    ran = subprocess.run([found, *arguments], cwd=directory, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
