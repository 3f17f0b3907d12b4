"""Each field of a config is honoured, refused by name, or said to have no effect."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import MixtralConfig, load_config
from model.errors import ConfigError
from model.rope_parameters import RopeParameters
from model.shard import Shard
from tests.tiny import CONFIG


def read(**changes: Any) -> MixtralConfig:
    return MixtralConfig.from_dict(CONFIG | changes, "config.json")


def test_fields_keep_hugging_faces_names_and_values() -> None:
    config = read(head_dim=24, sliding_window=7, eos_token_id=[2, 5], dtype="bfloat16")
    for name in ("vocab_size", "hidden_size", "num_local_experts", "num_experts_per_tok", "max_position_embeddings"):
        assert getattr(config, name) == CONFIG[name]
    assert (config.head_dim, config.sliding_window, config.eos_token_id) == (24, 7, (2, 5))
    assert config.dtype == "bfloat16"  # the new spelling wins over torch_dtype
    assert config.rope_parameters.rope_theta == CONFIG["rope_theta"]


def test_an_empty_config_means_what_transformers_takes_it_for() -> None:
    ours, theirs = MixtralConfig.from_dict({}, "config.json"), transformers.MixtralConfig()
    shared = set(MixtralConfig.__dataclass_fields__) & set(theirs.to_dict())
    shared -= {"head_dim", "rope_parameters", "eos_token_id"}
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert ours.eos_token_id == (theirs.eos_token_id,)
    assert ours.rope_parameters.rope_theta == theirs.rope_parameters["rope_theta"]


def test_what_transformers_saves_has_no_unknown_field(tmp_path: Path) -> None:
    transformers.MixtralConfig(**CONFIG).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert config.unknown == ()
    assert {"router_aux_loss_coef", "use_cache", "transformers_version"} <= set(config.without_effect)
    assert config.rope_parameters.rope_theta == CONFIG["rope_theta"]


def test_fields_nobody_knows_are_listed() -> None:
    assert read(mystery=1, another=2).unknown == ("another", "mystery")


def test_a_null_count_of_key_value_heads_means_one_for_each_query_head() -> None:
    assert read(num_key_value_heads=None).num_key_value_heads == 4


def test_a_null_end_of_sequence_means_that_there_is_none() -> None:
    assert read(eos_token_id=None).eos_token_id == ()


def test_other_spellings() -> None:
    renamed = {name: value for name, value in CONFIG.items() if name != "num_local_experts"}
    assert MixtralConfig.from_dict(renamed | {"num_experts": 6}, "c").num_local_experts == 6
    assert read(hidden_act="swish") == read()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"architectures": ["MixtralForCausalLM", "MixtralForQuestionAnswering"]}, "architectures"),
        ({"architectures": "MixtralForCausalLM"}, "architectures"),
        ({"architectures": ["MixtralForTokenClassification"], "id2label": {"1": "a", "2": "b"}}, "id2label"),
        ({"architectures": ["MixtralForTokenClassification"], "id2label": {"0": "a" * 300}}, "id2label"),
        ({"architectures": ["MixtralForTokenClassification"], "num_labels": 5000}, "num_labels"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quant_method"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"hidden_size": 66, "head_dim": None}, "num_attention_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"eos_token_id": 384}, "eos_token_id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"dtype": "float64"}, "dtype"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling: type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, "rope_scaling: beta_fast"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope_parameters: short_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [0.0] * 8}}, "rope_parameters: short_factor"),
        ({"rope_parameters": {"rope_theta": 1}}, "rope_parameters: rope_theta"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_parameters: high_freq_factor",
        ),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {field} ") as caught:
        read(**changes)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 1.5, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e4}},
    ],
)
def test_old_and_new_spellings_of_rope_mean_the_same(changes: dict[str, Any]) -> None:
    expected = RopeParameters("linear", 5e4, factor=2.0, original_max_position_embeddings=512)
    assert read(**changes).rope_parameters == expected


MISTRAL = {
    "dim": 64,
    "n_layers": 2,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 384,
    "moe": {"num_experts_per_tok": 2, "num_experts": 4},
}


def test_mistrals_params_are_the_same_config(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL | {"rope_theta": 1e4, "max_seq_len": 512}))
    ours = load_config(tmp_path)
    expected = read()
    for name in set(MixtralConfig.__dataclass_fields__) - {"dtype", "without_effect", "unknown"}:
        assert getattr(ours, name) == getattr(expected, name), name


@pytest.mark.parametrize("name", ["dim", "n_kv_heads", "vocab_size", "moe"])
def test_params_without_a_size_are_refused_in_their_own_spelling(name: str) -> None:
    params = {key: value for key, value in MISTRAL.items() if key != name}
    with pytest.raises(
        ConfigError, match=f"params.json: {'num_experts_per_tok' if name == 'moe' else name} is missing"
    ):
        MixtralConfig.from_params(params, "params.json")


@pytest.mark.parametrize("name", ["yarn", "vision_encoder", "quantization"])
def test_params_of_another_kind_of_model_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        MixtralConfig.from_params(MISTRAL | {name: {"factor": 2}}, "params.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00"])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_config_of_unreasonable_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(ConfigError, match="larger than"):
        load_config(tmp_path)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")

    def failing(self: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: Permission denied"):
        load_config(tmp_path)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither config\.json nor params\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 8), (12, 3), (6, 1)])
def test_every_rank_holds_the_key_value_heads_its_queries_look_at(heads: int, kv_heads: int) -> None:
    config = read(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    group = heads // kv_heads
    for size in range(1, heads + 1):
        if heads % size or (kv_heads % size and size % kv_heads):
            with pytest.raises(ConfigError, match=f"tensor parallel {size} does not fit"):
                config.head_slices(Shard(0, size))
            continue
        seen: list[int] = []
        for rank in range(size):
            queries, keys = config.head_slices(Shard(rank, size))
            # What attention does inside a rank: consecutive query heads share a key-value head.
            local_group = len(queries) // len(keys)
            assert [keys[place // local_group] for place in range(len(queries))] == [q // group for q in queries]
            assert config.local_kv_heads(Shard(rank, size)) == len(keys)
            seen += queries
        assert seen == list(range(heads))


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_a_classifier_says_what_its_outputs_mean(kind: str) -> None:
    architectures = [f"MixtralFor{kind}"]
    assert read(architectures=architectures, id2label={"1": "bad", "0": "good"}).labels == ("good", "bad")
    assert read(architectures=architectures).labels == ("LABEL_0", "LABEL_1")
    assert read(architectures=architectures, num_labels=3).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_labels_of_a_language_model_mean_nothing() -> None:
    assert read(id2label={"0": "x"}).labels == ()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)
NAMES = sorted(set(MixtralConfig.__dataclass_fields__) | {"architectures", "rope_scaling", "rope_theta", "id2label"})
ROPE = st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta", "long_factor"]), VALUES)


@settings(deadline=None, max_examples=2000 if os.environ.get("MIXTRAL_TEST_ALL") else 80)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES), st.none() | ROPE)
def test_whatever_a_config_holds_it_is_read_or_refused(changes: dict[str, Any], rope: dict[str, Any] | None) -> None:
    raw = CONFIG | changes | ({"rope_scaling": rope} if rope else {})
    with contextlib.suppress(ConfigError):
        MixtralConfig.from_dict(raw, "config.json")
    with contextlib.suppress(ConfigError):
        MixtralConfig.from_params(MISTRAL | raw, "params.json")
