"""The configuration: its sources and their order, what is refused and how it is said, what autos become."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.layout import Machine
from deployments.resolve import resolve
from deployments.settings import Settings, SettingsError, load
from tests.tiny import CONFIG

LAPTOP = Machine(cores=8, gpus=0)
SERVER = Machine(cores=64, gpus=8)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """All that resolving reads of a checkpoint."""
    directory = tmp_path / "my-model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def test_the_shipped_file_says_the_defaults() -> None:
    file = yaml.safe_load(Path("serve_config.yaml").read_text())
    assert load(file["applications"][0]["args"]) == Settings()
    assert file["applications"][0]["args"].keys() == Settings.model_fields.keys()


def test_later_sources_win() -> None:
    args = {"parallel": {"tensor": 2}, "kv_cache": {"page_size": 32, "prefix_caching": True}}
    environment = {"MIXTRAL_PARALLEL__TENSOR": "4", "MIXTRAL_KV_CACHE__PREFIX_CACHING": "false", "HOME": "/"}
    settings = load(args, environment, ["parallel.tensor=8", "served_model_name=[a, b]"])
    assert settings.parallel.tensor == 8
    assert settings.kv_cache.page_size == 32
    assert settings.kv_cache.prefix_caching is False
    assert settings.served_model_name == ["a", "b"]
    assert args == {"parallel": {"tensor": 2}, "kv_cache": {"page_size": 32, "prefix_caching": True}}


def test_an_override_can_say_null() -> None:
    assert load({"max_model_len": 5}, {}, ["max_model_len=null"]).max_model_len is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "demo"}, "modle is not a field; did you mean model?"),
        ({"parallel": {"tensors": 2}}, r"parallel.tensors is not a field; did you mean tensor\?"),
        ({"auth": {"whatever": 1}}, "possible here: api_keys_env, api_keys_file"),
        ({"parallel": {"tensor": "2"}}, "parallel.tensor: should be a valid integer, not '2'"),
        ({"parallel": {"tensor": True}}, "parallel.tensor: should be a valid integer"),
        ({"parallel": {"tensor": 0}}, "parallel.tensor: should be greater than or equal to 1"),
        ({"parallel": 3}, "parallel: should be a valid dictionary"),
        ({"parallel": None}, "parallel: should be a valid dictionary"),
        ({"limits": {"request_timeout_s": float("nan")}}, "limits.request_timeout_s: should be a finite number"),
        ({"limits": {"request_timeout_s": float("inf")}}, "limits.request_timeout_s: should be a finite number"),
        ({"limits": {"request_timeout_s": 0}}, "limits.request_timeout_s: should be greater than 0"),
        ({"scheduler": {"max_running": 10**30}}, "scheduler.max_running: should be less than or equal to"),
        ({"device": "gpu"}, "device: should be 'auto', 'cuda' or 'cpu', not 'gpu'"),
        ({"served_model_name": [1]}, r"served_model_name"),
        ({1: 2}, r"\[1\]: Keys should be strings"),
        ({"autoscaling": {"min_replicas": 3}}, "min_replicas 3 is above max_replicas 1"),
        ({"parallel": {"standby": 17}}, "parallel.standby: should be less than or equal to 16"),
    ],
)
def test_a_wrong_field_is_refused_in_one_sentence(args: dict[Any, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        load(args)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MIXTRAL_MODLE", "x", "MIXTRAL_MODLE is not a field; did you mean MIXTRAL_MODEL?"),
        ("MIXTRAL_PARALLEL__TENSR", "2", "MIXTRAL_PARALLEL__TENSR is not a field; did you mean tensor?"),
        ("MIXTRAL_PARALEL__TENSOR", "2", "MIXTRAL_PARALEL__TENSOR is not a field; did you mean parallel?"),
        ("MIXTRAL_PARALLEL__TENSOR", "two", "parallel.tensor: should be a valid integer, not 'two'"),
        ("MIXTRAL_PARALLEL__TENSOR", "1e3", "parallel.tensor: should be a valid integer"),
        ("MIXTRAL_PARALLEL__TENSOR", ".nan", "parallel.tensor"),
        ("MIXTRAL_MODEL", "[", "MIXTRAL_MODEL: '\\[' is not a YAML value"),
        ("MIXTRAL_MODEL", "!!python/object/apply:os.getcwd []", "not a YAML value"),
    ],
)
def test_a_wrong_variable_is_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load({}, {name: value})


def test_variables_that_kubernetes_makes_are_left_alone() -> None:
    """A Service named mixtral puts these into every pod of its namespace."""
    names = ("PORT", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8000_TCP", "PORT_8000_TCP_ADDR")
    assert load({}, {f"MIXTRAL_{name}": "tcp://10.0.0.1:8000" for name in names}) == Settings()


@pytest.mark.parametrize(
    "override", ["parallel.tensor", "=2", "parallel.tensr=2", "model.name=x", "parallel=[", "a.b=1"]
)
def test_a_wrong_override_is_refused(override: str) -> None:
    with pytest.raises(SettingsError):
        load({"model": "demo"}, {}, [override])


def test_autos_on_a_laptop(checkpoint: Path) -> None:
    result = resolve(load({"model": str(checkpoint), "parallel": {"tensor": 2}}), LAPTOP)
    assert result.engine.model_path == str(checkpoint)
    assert (result.engine.device, result.engine.dtype) == ("cpu", "float32")
    assert result.engine.parallel.threads_per_rank == 4
    assert result.engine.parallel.cpus_per_rank == 0.5
    assert result.model_names == ["my-model"]
    assert '"auto"' not in json.dumps({**result.config(), "parallel": None})
    assert result.config()["threads_per_rank"] == 4
    assert "auto: 0 GPUs here" in result.table()


def test_autos_on_a_server(checkpoint: Path) -> None:
    result = resolve(load({"model": str(checkpoint)}), SERVER)
    assert result.engine.device == "cuda"
    assert (result.engine.parallel.cpus_per_rank, result.engine.parallel.threads_per_rank) == (1, 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_ranks_of_a_cpu_replica_share_one_cpu_of_ray(ranks: int, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(
        json.dumps(CONFIG | {"num_attention_heads": 42, "num_key_value_heads": 42, "hidden_size": 84})
    )
    parallel = resolve(load({"model": str(checkpoint), "parallel": {"tensor": ranks}}), LAPTOP).engine.parallel
    assert 0.999 <= parallel.cpus_per_rank * ranks <= 1
    assert parallel.cpus_per_rank == round(parallel.cpus_per_rank, 4)
    assert parallel.threads_per_rank == max(1, 8 // ranks)


@pytest.mark.parametrize(
    ("saved", "wanted", "machine", "dtype"),
    [
        ("float32", "auto", LAPTOP, "float32"),
        ("bfloat16", "auto", LAPTOP, "bfloat16"),
        ("float16", "auto", LAPTOP, "bfloat16"),
        (None, "auto", LAPTOP, "float32"),
        ("float16", "auto", SERVER, "float16"),
        (None, "auto", SERVER, "bfloat16"),
        ("bfloat16", "float32", LAPTOP, "float32"),
    ],
)
def test_dtype(saved: str | None, wanted: str, machine: Machine, dtype: str, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": saved}))
    assert resolve(load({"model": str(checkpoint), "dtype": wanted}), machine).engine.dtype == dtype


@pytest.mark.parametrize(
    ("args", "machine", "message"),
    [
        ({"model": "mistralai/Mixtral-8x7B-v0.1"}, LAPTOP, "not a directory here.*nothing is downloaded.*or demo"),
        ({"parallel": {"tensor": 3}}, LAPTOP, "tensor parallel 3 does not fit 4 query"),
        (
            {"device": "cuda"},
            LAPTOP,
            "every rank needs a GPU, 1 in all, and there are 0; lower tensor or data, or set device",
        ),
        ({"parallel": {"tensor": 4, "data": 4}}, SERVER, "every rank needs a GPU, 16 in all, and there are 8"),
        (
            {"parallel": {"tensor": 2, "data": 3, "expert": 4}},
            LAPTOP,
            r"4 does not divide the 6 ranks.*use 1, 2, 3, 6 or",
        ),
        ({"parallel": {"spare_slots": 1}}, LAPTOP, "1 is more than a rank can use: 4 of 4 experts.*at most 0"),
        ({"parallel": {"data": 4, "spare_slots": 4}}, LAPTOP, "1 of 4 experts have a slot.*use at most 3"),
        ({"parallel": {"cpus_per_rank": 9.5}}, LAPTOP, "parallel.cpus_per_rank: 9.5 is more than any node has, 8"),
        ({"parallel": {"data": 3, "cpus_per_rank": 3}}, LAPTOP, "3 ranks want 3 CPUs each and there are 8; lower it"),
        ({"dtype": "float16"}, LAPTOP, "float16 is many times slower.*use bfloat16 or float32"),
        ({"task": "classify"}, LAPTOP, "task: classify is not what .* was made for; use auto or generate or embed"),
        ({"max_model_len": 513}, LAPTOP, "513 is more than the checkpoint's own, 512"),
        ({"served_model_name": []}, LAPTOP, "at least one name"),
        ({"served_model_name": ["a", "a"]}, LAPTOP, "none twice"),
    ],
)
def test_the_impossible_is_refused(args: dict[str, Any], machine: Machine, message: str, checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve(load({"model": str(checkpoint)} | args), machine)


@pytest.mark.parametrize(
    ("task", "architecture", "served"),
    [
        ("auto", "MixtralForCausalLM", "generate"),
        ("generate", "MixtralForCausalLM", "generate"),
        ("embed", "MixtralForCausalLM", "embed"),
        ("classify", "MixtralForSequenceClassification", "classify"),
    ],
)
def test_what_is_served_of_what_a_checkpoint_can_do(
    task: str, architecture: str, served: str, checkpoint: Path
) -> None:
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"architectures": [architecture]}))
    assert resolve(load({"model": str(checkpoint), "task": task}), LAPTOP).settings.task == served


def test_a_layout_of_groups_slices_and_replicas(checkpoint: Path) -> None:
    layout = {"tensor": 2, "data": 2, "expert": 2, "spare_slots": 1, "exchange": "all_reduce"}
    parallel = resolve(load({"model": str(checkpoint), "parallel": layout}), LAPTOP).engine.parallel
    assert (parallel.ranks, parallel.expert_slices, parallel.spare_slots) == (4, 2, 1)
    assert (parallel.exchange, parallel.threads_per_rank, parallel.cpus_per_rank) == ("all_reduce", 2, 0.25)
    whole = resolve(load({"model": str(checkpoint), "parallel": {"data": 2}}), LAPTOP)
    assert whole.settings.parallel.expert == 2, "what was null is shown as it was decided"


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"neither config\.json nor params\.json"):
        resolve(load({"model": str(tmp_path)}), LAPTOP)


def test_gpus_that_may_come_later_are_waited_for(checkpoint: Path) -> None:
    settings = load({"model": str(checkpoint), "device": "cuda"})
    assert resolve(settings, Machine(8, 0, may_grow=True)).engine.device == "cuda"


def test_what_is_resolved_travels(checkpoint: Path) -> None:
    result = resolve(load({"model": str(checkpoint), "auth": {"api_keys_env": "KEYS"}}), LAPTOP)
    assert pickle.loads(pickle.dumps(result)) == result
    assert "KEYS" not in result.table()
