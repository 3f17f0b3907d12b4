"""mixtral-serve doctor --collectives, on processes of its own."""

from __future__ import annotations

import pytest

from deployments.cli import main


def test_ranks_meet_lose_one_and_meet_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--collectives", "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "bad" not in out
    assert out.count("2 ranks meet over gloo") == 2
    assert out.count("one is killed") == out.count("2 ranks meet over") // 2
