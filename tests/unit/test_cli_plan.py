"""mixtral-serve plan, as one types it."""

from __future__ import annotations

import os
import sys

import pytest

from deployments.cli import main


def test_a_table_and_what_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "8x7b", "--gpus", "4", "--gpu", "h100", "--context", "8192"]) == 0
    out = capsys.readouterr().out
    assert "2 x tensor 2 experts whole" in out
    assert "Too large for a H100 SXM: 4 x tensor 1." in out
    assert "Lowest latency      tensor 4 experts cut" in out
    assert "Least lost at once  2 x tensor 2" in out
    assert "50% of the capacity pauses" in out


def test_what_does_not_fit_says_what_is_lacking(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "8x22b", "--gpu", "rtx4090", "--context", "1024"]) == 1
    assert "lacks 23" in capsys.readouterr().out


def test_cards_can_be_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--memory", "1.5", "--bandwidth", "100", "--link", "10", "--gpus", "2"]) == 0
    assert "2 x tensor 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["8x7b", "--context", "1000000"], "is more than the model's own, 32768"),
        (["7x3b"], "model: 7x3b is not a directory here; give that of a checkpoint, demo, 8x7b or 8x22b."),
        (["8x7b", "--gpus", "7", "--memory", "1"], None),
    ],
)
def test_mistakes_get_a_sentence(
    arguments: list[str], sentence: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert (sentence or "Nothing fits") in captured.err + captured.out


@pytest.mark.parametrize("flag", [["--gpus", "0"], ["--gpus", "2000"], ["--context", "x"]])
def test_numbers_are_bounded(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "8x7b", *flag])
    assert "is" in capsys.readouterr().err


def test_fewer_bits_fit_where_all_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "8x7b", "--gpu", "a100-40", "--context", "4096"]
    assert main(arguments) == 1
    assert main([*arguments, "--quantization", "int4"]) == 0
    assert "23.5 GiB" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `mixtral-serve plan ... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["plan", "8x7b", "--gpus", "2"]) == 141
