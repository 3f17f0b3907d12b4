"""What quantize writes is what quantising at load gives, and what the formats' own definitions say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deployments.cli import main
from model import new_checkpoint
from model.checkpoint import load_weights
from model.config import load_config
from model.convert import convert
from model.errors import ConfigError, ConversionError
from model.modes import Mode
from model.quantized_config import format_for
from model.quantized_writer import quantize_checkpoint
from model.shard import Shard
from model.weights import MixtralWeights
from tests.checkpoints import CPU, assert_same, flattened, fused, load
from tests.quantized_checkpoints import SIZES
from tests.tiny import write_checkpoint

MODES: tuple[Mode, ...] = ("int8", "int4", "nf4", "fp8")


def quantized_at_load(directory: Path, mode: Mode, dtype: torch.dtype = torch.float32) -> MixtralWeights:
    return load_weights(directory, load_config(directory), Shard(), dtype=dtype, device=CPU, quantization=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_or_made_at_load_it_is_the_same(tmp_path: Path, mode: Mode, dtype: torch.dtype) -> None:
    source = write_checkpoint(tmp_path / "source", **SIZES)
    quantize_checkpoint(source, tmp_path / "target", mode)
    config = load_config(tmp_path / "target")
    assert config.quantization == format_for(mode)
    expected = quantized_at_load(source, mode, dtype)
    found = load(tmp_path / "target", dtype=dtype)
    assert_same(found, expected)
    assert found.nbytes == expected.nbytes
    for a, b in zip(found.blocks, expected.blocks, strict=True):
        assert type(a.qkv) is type(b.qkv)


@pytest.mark.parametrize("mode", MODES)
def test_slices_of_what_was_written_make_up_the_whole(tmp_path: Path, mode: Mode) -> None:
    quantize_checkpoint(write_checkpoint(tmp_path / "source", **SIZES), tmp_path / "target", mode)
    whole = load(tmp_path / "target")
    parts = [load(tmp_path / "target", Shard(rank, 4, expert_slice=rank, expert_slices=4)) for rank in range(4)]
    for layer, block in enumerate(whole.blocks):
        outputs = [part.blocks[layer].output.weight_OI for part in parts]
        downs = [part.blocks[layer].experts[1].down.weight_OI for part in parts]
        assert torch.equal(torch.cat(outputs, dim=1), block.output.weight_OI)
        assert torch.equal(torch.cat(downs, dim=1), block.experts[1].down.weight_OI)


def from_mistral(source: Path, directory: Path) -> None:
    convert(source, directory, "mistral")


def from_fused(source: Path, directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors: dict[str, Tensor] = load_file(source / "model.safetensors")
    save_file(fused(tensors), directory / "model.safetensors")


@pytest.mark.parametrize("other", [from_mistral, from_fused])
def test_every_dialect_can_be_quantised(tmp_path: Path, other: Callable[[Path, Path], None]) -> None:
    source = write_checkpoint(tmp_path / "hf", **SIZES)
    other(source, tmp_path / "other")
    for name in ("hf", "other"):
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name} int4", "int4")
    assert_same(load(tmp_path / "other int4"), load(tmp_path / "hf int4"))


def test_the_config_and_other_files_come_along(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", sliding_window=9, **SIZES)
    quantize_checkpoint(source, tmp_path / "target", "int8")
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "target"))
    assert after.pop("quantization_config")["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert after == before
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_large_models_come_in_parts_and_progress_is_told(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source", **SIZES)
    quantize_checkpoint(source, tmp_path / "one", mode)
    monkeypatch.setattr(new_checkpoint, "PART_BYTES", 150_000)
    heard: list[tuple[int, int]] = []
    quantize_checkpoint(source, tmp_path / "parts", mode, lambda *told: heard.append(told))
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert_same(load(tmp_path / "parts"), load(tmp_path / "one"))
    size = sum(x.nbytes for x in load_file(tmp_path / "one" / "model.safetensors").values())
    assert heard[-1] == (size, size)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tie_word_embeddings=True, **SIZES)
    quantize_checkpoint(source, tmp_path / "target", "fp8")
    assert "lm_head.weight" not in load_file(tmp_path / "target" / "model.safetensors")
    assert torch.equal(flattened(load(tmp_path / "target"))[2], flattened(load(source))[2])


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", **SIZES)
    quantize_checkpoint(source, tmp_path / "int8", "int8")
    with pytest.raises(ConversionError, match="int8 holds int8 weights; quantise what they came from"):
        quantize_checkpoint(tmp_path / "int8", tmp_path / "again", "int4")
    with pytest.raises(ConversionError, match="holds int8 weights; convert what they came from"):
        convert(tmp_path / "int8", tmp_path / "again", "mistral")
    with pytest.raises(ConversionError, match="exists already"):
        quantize_checkpoint(source, tmp_path / "int8", "int4")
    with pytest.raises(ConfigError, match="intermediate_size 96"):
        quantize_checkpoint(write_checkpoint(tmp_path / "narrow"), tmp_path / "again", "nf4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "narrow", "source"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", **SIZES)
    arguments = ["quantize", str(source), str(tmp_path / "target"), "--mode", "nf4"]
    assert main([*arguments, "--quiet"]) == 0
    assert_same(load(tmp_path / "target"), quantized_at_load(source, "nf4"))
    assert capsys.readouterr().err == ""
    assert main(arguments) == 2
    assert "exists already: name a directory that does not, or an empty one." in capsys.readouterr().err
