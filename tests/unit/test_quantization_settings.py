"""`quantization` in the configuration: what reaches the ranks, and what is refused before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config import EngineConfig, ParallelConfig
from cluster.placement import even_placement
from cluster.worker import Worker
from deployments.cli import main
from deployments.layout import Machine
from deployments.resolve import resolve
from deployments.settings import SettingsError, load
from model.modes import Mode
from model.quantized_config import format_for
from model.quantized_writer import quantize_checkpoint
from tests.quantized_checkpoints import SIZES
from tests.tiny import CONFIG, write_checkpoint

LAPTOP = Machine(8, 0)
MODES: tuple[Mode, ...] = ("int8", "int4", "nf4", "fp8")
BITS = {"int8": 8.1, "fp8": 8.1, "int4": 4.25, "nf4": 4.5}  # of a weight, with its share of a scale


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_reaches_the_ranks(tmp_path: Path, mode: Mode) -> None:
    directory = write_checkpoint(tmp_path, **SIZES)
    resolved = resolve(load({"model": str(directory), "quantization": mode}), LAPTOP)
    assert resolved.engine.quantization == mode
    plain = resolve(load({"model": str(directory)}), LAPTOP)
    assert plain.engine.quantization == "none"
    assert plain.fingerprint != resolved.fingerprint


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_that_was_saved_quantised_says_so(tmp_path: Path, mode: Mode) -> None:
    quantize_checkpoint(write_checkpoint(tmp_path / "source", **SIZES), tmp_path / "target", mode)
    for wanted in ("none", mode):
        resolved = resolve(load({"model": str(tmp_path / "target"), "quantization": wanted}), LAPTOP)
        assert resolved.engine.quantization == resolved.settings.quantization == mode
        assert "the checkpoint's" in resolved.reasons["quantization"]
    other = "int4" if mode == "int8" else "int8"
    with pytest.raises(
        SettingsError, match=f"quantization: the checkpoint is {mode} already and cannot become {other}"
    ):
        resolve(load({"model": str(tmp_path / "target"), "quantization": other}), LAPTOP)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor": 8}, "tensor parallel 8 leaves 32 of attention's output projection"),
        ({"data": 3, "expert": 1}, "intermediate_size 256 in 3 slices leaves 86 of an expert on a rank"),
    ],
)
def test_a_layout_that_cuts_groups_is_refused(tmp_path: Path, parallel: dict[str, int], message: str) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | SIZES | sizes))
    args = {"model": str(tmp_path), "parallel": parallel}
    with pytest.raises(SettingsError, match=f"^quantization: nf4 keeps 64 columns of a matrix together, and {message}"):
        resolve(load(args | {"quantization": "nf4"}), LAPTOP)
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG | SIZES | sizes | {"quantization_config": format_for("nf4").config()})
    )
    with pytest.raises(SettingsError, match=message):
        resolve(load(args), LAPTOP)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | SIZES | sizes))
    assert resolve(load(args | {"quantization": "int8"}), LAPTOP).engine.quantization == "int8"


def test_what_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(SettingsError, match='quant_method must be one of compressed-tensors, bitsandbytes, not "gptq"'):
        resolve(load({"model": str(tmp_path)}), LAPTOP)


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_reports_the_bytes_it_keeps(tmp_path: Path, mode: Mode) -> None:
    directory = write_checkpoint(tmp_path, **SIZES)
    kept = {}
    for quantization in ("none", mode):
        config = EngineConfig(str(directory), quantization=quantization, parallel=ParallelConfig())
        kept[quantization] = Worker(0, config, even_placement(2, 4, 1)).load().weight_bytes
    D, F, Q = SIZES["hidden_size"], SIZES["intermediate_size"], 4 * SIZES["head_dim"]
    projections = 2 * (4 * Q * D + 4 * 3 * F * D)
    saved = projections * (4 - BITS[mode] / 8)
    assert kept["none"] - kept[mode] == pytest.approx(saved, rel=0.02)


def test_a_plan_counts_what_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_checkpoint(tmp_path / "plain", **SIZES)
    quantize_checkpoint(plain, tmp_path / "int4", "int4")
    assert main(["plan", str(plain), "--quantization", "int4"]) == 0
    expected = capsys.readouterr().out
    assert main(["plan", str(tmp_path / "int4")]) == 0
    assert capsys.readouterr().out == expected
    assert main(["plan", str(tmp_path / "int4"), "--quantization", "fp8"]) == 2
    assert "--quantization: the checkpoint is int4 already and cannot become fp8" in capsys.readouterr().err
