"""Every dialect gives the same weights; a rank reads its share and no more; broken files are named, not crashed on."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import load_weights
from model.config import MixtralConfig, load_config
from model.errors import CheckpointError, ConfigError
from model.shard import Shard
from model.weights import MixtralWeights
from tests.tiny import CONFIG, weights, write_checkpoint

CPU = torch.device("cpu")


def load(directory: Path, shard: Shard = Shard(), dtype: torch.dtype = torch.float32) -> MixtralWeights:  # noqa: B008
    return load_weights(directory, load_config(directory), shard, dtype=dtype, device=CPU)


def head_of(weights: MixtralWeights) -> Tensor:
    assert weights.head is not None
    return weights.head.weight_OI


def flattened(weights: MixtralWeights) -> list[Tensor]:
    tensors = [weights.embedding_VD, weights.norm_D, head_of(weights)]
    for block in weights.blocks:
        tensors += [block.attention_norm_D, block.qkv.weight_OI, block.output.weight_OI, block.moe_norm_D]
        tensors.append(block.router_ED)
        for expert in block.experts:
            tensors += [expert.gate_up.weight_OI, expert.down.weight_OI]
    return tensors


def assert_same(found: MixtralWeights, expected: MixtralWeights) -> None:
    for a, b in zip(flattened(found), flattened(expected), strict=True):
        assert torch.equal(a, b)


# Dialects: each rewrites the tiny checkpoint of Hugging Face's per-expert names in another spelling.


def pairs_from_halves(matrix: Tensor, heads: int) -> Tensor:
    head_dim, width = matrix.shape[0] // heads, matrix.shape[1]
    return matrix.view(heads, 2, head_dim // 2, width).transpose(1, 2).reshape(matrix.shape).contiguous()


def mistral(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        if ".q_proj" in name:
            tensor = pairs_from_halves(tensor, CONFIG["num_attention_heads"])
        if ".k_proj" in name:
            tensor = pairs_from_halves(tensor, CONFIG["num_key_value_heads"])
        for old, new in (
            ("model.embed_tokens", "tok_embeddings"),
            ("model.", ""),
            ("lm_head", "output"),
            ("self_attn", "attention"),
            ("q_proj", "wq"),
            ("k_proj", "wk"),
            ("v_proj", "wv"),
            ("o_proj", "wo"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("block_sparse_moe", "feed_forward"),
        ):
            name = name.replace(old, new)
        out[name] = tensor
    return out


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {name.replace("feed_forward", "block_sparse_moe"): x for name, x in mistral(tensors).items()}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"layers.{layer}.block_sparse_moe."
        for w in ("w1", "w2", "w3"):
            names = [f"{prefix}experts.{e}.{w}.weight" for e in range(CONFIG["num_local_experts"])]
            parts = [out.pop(name) for name in names]
            out[prefix + w] = torch.cat([part.T if w == "w2" else part for part in parts]).contiguous()
    return out


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = dict(tensors)
    for layer in range(CONFIG["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        out[new + "gate.weight"] = out.pop(old + "gate.weight")
        experts = [
            [out.pop(f"{old}experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")]
            for e in range(CONFIG["num_local_experts"])
        ]
        out[new + "experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
        out[new + "experts.down_proj"] = torch.stack([down for _, _, down in experts])
    return out


def write_params(directory: Path) -> None:
    names = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "hidden_dim": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
        "vocab_size": "vocab_size",
        "rope_theta": "rope_theta",
    }
    params = {theirs: CONFIG[ours] for theirs, ours in names.items()}
    moe = {"num_experts": CONFIG["num_local_experts"], "num_experts_per_tok": CONFIG["num_experts_per_tok"]}
    (directory / "params.json").write_text(json.dumps(params | {"head_dim": 16, "moe": moe}))


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


def write_index(directory: Path, parts: int) -> Path:
    """Split model.safetensors as large models come."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in range(parts):
        name = f"model-{number + 1:05}-of-{parts:05}.safetensors"
        part = dict(list(tensors.items())[number::parts])
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_files_split_by_an_index_give_the_same_weights(tmp_path: Path) -> None:
    expected = load(write_checkpoint(tmp_path / "a"))
    directory = write_checkpoint(tmp_path / "b")
    write_index(directory, 3)
    assert_same(load(directory), expected)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    found = load(write_checkpoint(tmp_path, tie_word_embeddings=True))
    assert torch.equal(head_of(found), found.embedding_VD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_once_to_the_wanted_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write_checkpoint(tmp_path)
    wide, narrow = load(directory), load(directory, dtype=dtype)
    for a, b in zip(flattened(wide), flattened(narrow), strict=True):
        assert torch.equal(a.to(dtype), b)


# Shards


@pytest.mark.parametrize(("size", "kv_heads", "vocab"), [(2, 2, 384), (2, 1, 385), (4, 2, 387), (4, 4, 384)])
def test_slices_of_all_ranks_make_up_the_whole(tmp_path: Path, size: int, kv_heads: int, vocab: int) -> None:
    directory = write_checkpoint(tmp_path, num_key_value_heads=kv_heads, vocab_size=vocab)
    whole = load(directory)
    slots = ((0, 2), (3,))
    ranks = [load(directory, Shard(rank, size, slots)) for rank in range(size)]
    C, H = 16, 4
    G = max(1, kv_heads // size)
    for layer, block in enumerate(whole.blocks):
        q, k, v = block.qkv.weight_OI.split([H * C, kv_heads * C, kv_heads * C])
        for rank, held in enumerate(ranks):
            local_q, local_k, local_v = held.blocks[layer].qkv.weight_OI.split([H // size * C, G * C, G * C])
            assert torch.equal(local_q, q.chunk(size)[rank])
            first = rank * H // size // (H // kv_heads) * C
            assert torch.equal(local_k, k[first : first + G * C])
            assert torch.equal(local_v, v[first : first + G * C])
            for slot, expert in enumerate(slots[layer]):
                found, expected = held.blocks[layer].experts[slot], block.experts[expert]
                assert torch.equal(found.down.weight_OI, expected.down.weight_OI)
        columns = [held.blocks[layer].output.weight_OI for held in ranks]
        assert torch.equal(torch.cat(columns, dim=1), block.output.weight_OI)
    assert torch.equal(torch.cat([held.embedding_VD for held in ranks]), whole.embedding_VD)
    assert torch.equal(torch.cat([head_of(held) for held in ranks]), head_of(whole))
    assert [held.first_token for held in ranks] == [sum(len(r.embedding_VD) for r in ranks[:i]) for i in range(size)]


@pytest.mark.parametrize("rewrite", [dict, fused])
def test_a_rank_reads_its_share_and_no_more(
    tmp_path: Path, rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path)
    save_file(rewrite(weights(CONFIG)), directory / "model.safetensors")
    total = sum(x.nbytes for x in weights(CONFIG).values())
    slots = [((0, 1), (0, 1)), ((2, 3), (2, 3))]
    requested = 0
    pread = os.preadv

    def counting(descriptor: int, buffers: list[Any], offset: int) -> int:
        nonlocal requested
        requested += sum(len(buffer) for buffer in buffers)
        return int(pread(descriptor, buffers, offset))

    monkeypatch.setattr("model.tensor_files.os.preadv", counting)
    heard: list[tuple[int, int]] = []
    for rank in range(2):
        requested = 0
        heard.clear()
        load_weights(
            directory,
            load_config(directory),
            Shard(rank, 2, slots[rank]),
            dtype=torch.float32,
            device=CPU,
            progress=lambda *told: heard.append(told),
        )
        # Norms and routers lie on every rank; in this tiny model they are 1.2 % of the whole.
        copies = sum(x.nbytes for name, x in weights(CONFIG).items() if "norm" in name or "moe.gate" in name)
        assert requested == pytest.approx(total / 2, rel=0.01 + copies / total)
        assert heard[-1] == (requested, requested)
        assert [done for done, _ in heard] == sorted(done for done, _ in heard)


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(3, 4, 2), (4, 12, 6), (8, 4, 2)])
def test_an_impossible_slicing_is_refused_before_any_file_is_opened(size: int, heads: int, kv_heads: int) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    config = MixtralConfig.from_dict(CONFIG | sizes, "config.json")
    with pytest.raises(ConfigError, match=f"tensor parallel {size} does not fit {heads} query and {kv_heads}"):
        load_weights(Path("/nowhere"), config, Shard(0, size), dtype=torch.float32, device=CPU)


# What can be wrong with files


def changed(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = weights(CONFIG)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), r"layers\.1\.self_attn\.q_proj\.weight is missing"),
        (lambda t: t.update({Q: t[Q][:-1].contiguous()}), r"q_proj\.weight has shape \(63, 64\).* promises \(64, 64\)"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "model.safetensors: extra is no part"),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), "q_proj.weight is F8_E4M3; served are"),
        (lambda t: [t.pop(name) for name in list(t)[1:]], "no Mixtral weights; looked for"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    directory = changed(write_checkpoint(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


@pytest.mark.parametrize("rewrite", [dict, fused])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_named_when_asked(
    tmp_path: Path, value: float, rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    directory = write_checkpoint(tmp_path)
    tensors = rewrite(weights(CONFIG))
    name = next(name for name in tensors if "layers.1" in name and ("experts.3.w2" in name or "down_proj" in name))
    tensors[name][-1, -1] = value
    save_file(tensors, directory / "model.safetensors")
    load(directory)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} holds NaN or infinity$"):
        load_weights(directory, load_config(directory), Shard(), dtype=torch.float32, device=CPU, check_finite=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_weights_pass(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write_checkpoint(tmp_path)
    found = load_weights(directory, load_config(directory), Shard(), dtype=dtype, device=CPU, check_finite=True)
    assert_same(found, load(directory, dtype=dtype))


def test_weights_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    directory = changed(write_checkpoint(tmp_path), lambda t: t[Q].fill_(1e5))
    with pytest.raises(CheckpointError, match=r"q_proj.weight holds NaN or infinity, as saved or once cast to .*16"):
        load_weights(directory, load_config(directory), Shard(), dtype=torch.float16, device=CPU, check_finite=True)


def test_a_tied_head_that_was_saved_all_the_same_is_ignored(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(384, 64)}, directory / "model.safetensors")
    found = load(directory)
    assert torch.equal(head_of(found), found.embedding_VD)


def test_buffers_of_old_files_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(changed(write_checkpoint(tmp_path), lambda t: t.update({name: torch.zeros(8)})))


@pytest.mark.parametrize("keep", [0, 4, 2000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 3}', "a lacks dtype"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "impossible shape"),
        (b'{"a": {"dtype": "F32", "shape": [1e3], "data_offsets": [0, 4]}}', "impossible shape"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', "not what its shape needs"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "cut short at a"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)
    with pytest.raises(CheckpointError, match="header of 1073741824 bytes"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", ".."])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: str) -> None:
    index = write_index(write_checkpoint(tmp_path), 2)
    index.write_text(json.dumps({"weight_map": {Q: name}}))
    with pytest.raises(CheckpointError, match="which is not a safetensors file beside it"):
        load(tmp_path)


def test_an_unfinished_download_says_which_file_is_missing(tmp_path: Path) -> None:
    index = write_index(write_checkpoint(tmp_path), 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 3 files and model-00002-of-00003\.safetensors is missing"):
        load(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json: finish the download"):
        load(tmp_path)


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(tmp_path)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    for number in range(2):
        save_file(mistral(weights(CONFIG)), directory / f"consolidated.0{number}.safetensors")
    with pytest.raises(CheckpointError, match="is in another file too"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK nonsense", [1, 2], {"a": "text"}, {"a": torch.ones(1, dtype=torch.int8)}]
)
def test_a_torch_file_of_anything_but_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    path = directory / "consolidated.00.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        load(directory)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, keep: float) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    path = directory / "consolidated.00.pth"
    torch.save(stacked(weights(CONFIG)), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="not a complete file of plain tensors"):
        load(directory)


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


def test_a_torch_file_cannot_run_code(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    torch.save({"a": Trap(tmp_path / "sprung")}, directory / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="not a complete file of plain tensors"):
        load(directory)
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_header_is_refused_or_means_the_same(tmp_path: Path) -> None:
    """Bytes of the header changed at random: no other error, no other shapes, no endless read."""
    directory = write_checkpoint(tmp_path, num_hidden_layers=1, num_local_experts=2)
    path = directory / "model.safetensors"
    expected = [x.shape for x in flattened(load(directory))]
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header_end)] = rng.choice([*b'0123456789"{}[],:', rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            found = load(directory)
        except CheckpointError:
            continue
        assert [x.shape for x in flattened(found)] == expected


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path)
    monkeypatch.setattr("model.tensor_files.os.preadv", lambda *arguments: 0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* is cut short; the file changed"):
        load(directory)


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path)

    def failing(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("model.tensor_files.os.preadv", failing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Input/output error"):
        load(directory)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_files_is_refused(tmp_path: Path, content: str) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(tmp_path)
