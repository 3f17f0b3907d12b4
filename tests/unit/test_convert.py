"""Both layouts hold the same weights: there and back again nothing has changed, and nothing is written over."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model import new_checkpoint
from model.config import load_config
from model.convert import Layout, convert
from model.errors import CheckpointError, ConversionError
from tests.tiny import CONFIG, weights, write_checkpoint

ROPE = {"rope_theta": 5e5}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "eos_token_id": [2, 7], "bos_token_id": None},
    {"sliding_window": 8, "head_dim": 24, "max_position_embeddings": 32768, "eos_token_id": None} | ROPE,
    {"num_key_value_heads": 4, "num_local_experts": 3, "num_experts_per_tok": 1, "bos_token_id": 5},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_again(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    source = write_checkpoint(tmp_path / "hf", **changes)
    tensors = {name: x.to(dtype) for name, x in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "mistral", "mistral")
    convert(tmp_path / "mistral", tmp_path / "back", "huggingface")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
    name = str(dtype).removeprefix("torch.")
    assert load_config(tmp_path / "back") == replace(load_config(source), dtype=name)
    # A second round gives the same files, byte for byte.
    convert(tmp_path / "back", tmp_path / "mistral again", "mistral")
    for file in ("params.json", "consolidated.safetensors"):
        assert (tmp_path / "mistral again" / file).read_bytes() == (tmp_path / "mistral" / file).read_bytes()


def test_transformers_reads_what_was_converted(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf")
    convert(source, tmp_path / "mistral", "mistral")
    convert(tmp_path / "mistral", tmp_path / "back", "huggingface")
    text = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before, after = (
            transformers.MixtralForCausalLM.from_pretrained(directory)(text).logits
            for directory in (source, tmp_path / "back")
        )
    assert torch.equal(before, after)


def test_mistrals_names_shapes_and_pairs(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "hf"), tmp_path / "mistral", "mistral")
    found, tensors = load_file(tmp_path / "mistral" / "consolidated.safetensors"), weights(CONFIG)
    assert len(found) == len(tensors)
    assert torch.equal(
        found["layers.1.feed_forward.experts.3.w2.weight"],
        tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"],
    )
    query = tensors["model.layers.0.self_attn.q_proj.weight"]
    # Head 1, dimensions 0 and 8 turn together: they become rows 0 and 1 of the head.
    assert torch.equal(found["layers.0.attention.wq.weight"][16:18], query[[16, 24]])
    params = json.loads((tmp_path / "mistral" / "params.json").read_text())
    assert params == {
        "vocab_size": 384,
        "dim": 64,
        "hidden_dim": 96,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "moe": {"num_experts": 4, "num_experts_per_tok": 2},
        "max_seq_len": 512,
    }


def test_large_models_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(write_checkpoint(tmp_path / "hf"), tmp_path / "mistral", "mistral")
    monkeypatch.setattr(new_checkpoint, "PART_BYTES", 150_000)
    convert(tmp_path / "mistral", tmp_path / "back", "huggingface")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    parts = sorted((tmp_path / "back").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in parts]
    assert len(parts) > 3
    assert all(path.stat().st_size < 160_000 for path in parts)
    found = {name: tensor for path in parts for name, tensor in load_file(path).items()}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    for name, tensor in weights(CONFIG).items():
        assert torch.equal(found[name], tensor)


def test_other_files_come_along(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "README.md").write_text("not for the model")
    convert(source, tmp_path / "mistral", "mistral")
    found = {str(path.relative_to(tmp_path / "mistral")) for path in (tmp_path / "mistral").rglob("*.*")}
    assert found == {
        "additional_chat_templates/tools.jinja",
        "consolidated.safetensors",
        "params.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (tmp_path / "mistral" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    convert(write_checkpoint(tmp_path / "hf"), tmp_path / "mistral", "mistral", lambda *told: heard.append(told))
    total = sum(x.nbytes for x in weights(CONFIG).values())
    assert heard[-1] == (total, total)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert len(heard) == len(weights(CONFIG))


@pytest.mark.parametrize("to", ["huggingface", "mistral"])
def test_nothing_is_written_over(tmp_path: Path, to: Layout) -> None:
    source = write_checkpoint(tmp_path / "hf")
    if to == "huggingface":
        convert(source, tmp_path / "mistral", "mistral")
        source = tmp_path / "mistral"
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("the only copy")
    for taken in (target, target / "thesis.txt", source):
        with pytest.raises(ConversionError, match="exists already"):
            convert(source, taken, to)
    assert (target / "thesis.txt").read_text() == "the only copy"
    (target / "thesis.txt").unlink()
    convert(source, target, to)
    assert load_config(target).hidden_size == 64


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "hf")
    pread, reads = os.preadv, random.Random(0).randint(2, 20)

    def failing(*arguments: Any) -> int:
        nonlocal reads
        reads -= 1
        return pread(*arguments) if reads else 0

    monkeypatch.setattr("model.tensor_files.os.preadv", failing)
    with pytest.raises(CheckpointError, match="cut short"):
        convert(source, tmp_path / "mistral", "mistral")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_a_killed_conversion_left_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "mistral.unfinished").mkdir()
    with pytest.raises(ConversionError, match=r"mistral\.unfinished is in the way"):
        convert(write_checkpoint(tmp_path / "hf"), tmp_path / "mistral", "mistral")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    total = sum(x.nbytes for x in weights(CONFIG).values())
    with pytest.raises(ConversionError, match=f"needs {total} bytes and the disk has 1000 free"):
        convert(write_checkpoint(tmp_path / "hf"), tmp_path / "mistral", "mistral")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_where_nothing_can_be_written_the_system_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"mistral cannot be written: (File exists|Not a directory)"):
        convert(write_checkpoint(tmp_path / "hf"), tmp_path / "file" / "mistral", "mistral")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "has linear rotary embedding"),
        ({"architectures": ["MixtralModel"]}, "is a MixtralModel; Mistral's layout is of language models alone"),
    ],
)
def test_what_mistrals_layout_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = write_checkpoint(tmp_path / "hf", **changes)
    if "architectures" in changes:
        tensors = weights(CONFIG)
        del tensors["lm_head.weight"]
        save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "mistral", "mistral")
    assert not (tmp_path / "mistral").exists()


def test_the_same_layout_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf")
    with pytest.raises(ConversionError, match="is in the huggingface layout already"):
        convert(source, tmp_path / "other", "huggingface")
