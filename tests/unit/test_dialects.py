"""Every dialect gives the same weights; tensors that do not belong, or not so, are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import CheckpointError
from tests.checkpoints import (
    QUERY,
    assert_same,
    changed,
    fused,
    head_of,
    load,
    mistral,
    stacked,
    write_params,
)
from tests.tiny import CONFIG, weights, write_checkpoint


@pytest.mark.parametrize("rewrite", [mistral, stacked])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_mistral_files_give_hugging_faces_weights(
    tmp_path: Path, rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]], suffix: str
) -> None:
    expected = load(write_checkpoint(tmp_path / "hf"))
    directory = tmp_path / "mistral"
    directory.mkdir()
    write_params(directory)
    tensors = rewrite(weights(CONFIG))
    parts = [dict(list(tensors.items())[part::2]) for part in range(2)]
    for number, part in enumerate(parts):
        path = directory / f"consolidated.0{number}{suffix}"
        if suffix == ".safetensors":
            save_file(part, path)
        else:
            torch.save(part, path)
    assert_same(load(directory), expected)


def test_fused_experts_as_transformers_holds_them_give_the_same_weights(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    expected = load(directory)
    model = transformers.MixtralForCausalLM.from_pretrained(directory)
    assert model.state_dict().keys() == fused(weights(CONFIG)).keys()
    save_file(model.state_dict(), directory / "model.safetensors")
    assert_same(load(directory), expected)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    found = load(write_checkpoint(tmp_path, tie_word_embeddings=True))
    assert torch.equal(head_of(found), found.embedding_VD)


def test_a_tied_head_that_was_saved_all_the_same_is_ignored(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(384, 64)}, directory / "model.safetensors")
    found = load(directory)
    assert torch.equal(head_of(found), found.embedding_VD)


def test_buffers_of_old_files_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(changed(write_checkpoint(tmp_path), lambda t: t.update({name: torch.zeros(8)})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), r"layers\.1\.self_attn\.q_proj\.weight is missing"),
        (
            lambda t: t.update({QUERY: t[QUERY][:-1].contiguous()}),
            r"q_proj\.weight has shape \(63, 64\).* promises \(64, 64\)",
        ),
        (lambda t: t.update({"extra": torch.zeros(1)}), "model.safetensors: extra is no part"),
        (lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}), "q_proj.weight is F8_E4M3; served are"),
        (lambda t: [t.pop(name) for name in list(t)[1:]], "no Mixtral weights; looked for"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    directory = changed(write_checkpoint(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        load(directory)
