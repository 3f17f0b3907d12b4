"""With RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_THROUGHPUT_OPTIMIZED; what is checked stands in direct_streaming.py."""

from __future__ import annotations

import pytest

from tests.e2e.direct_streaming import CHECKS
from tests.e2e.server import Server


@pytest.mark.parametrize("check", [*(check.__name__ for check in CHECKS), "end"])
def test_direct_streaming(direct_streaming: Server, check: str) -> None:
    direct_streaming.wait()
    assert f"{check}: ok" in direct_streaming.output.splitlines(), direct_streaming.output
