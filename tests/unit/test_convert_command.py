from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from deployments.cli import main
from tests.tiny import write_checkpoint


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "hf")
    assert main(["convert", str(source), str(tmp_path / "mistral"), "--to", "mistral"]) == 0
    assert "100%" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "mistral"), str(tmp_path / "back"), "--to", "huggingface", "--quiet"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "hf")
    assert main(["convert", str(source), str(source), "--to", "mistral"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mixtral-serve: {source}")
    assert said.count("\n") == 1, "and no progress of what never began"
