"""The configuration an operator writes: every field, its type and bounds, and where it may come from.

    serve_config.yaml `args`  <  environment MIXTRAL_PARALLEL__TENSOR=2  <  --set parallel.tensor=2

Read once, in build() or the command line; the only place that reads MIXTRAL_ variables. What the fields
mean on a given machine (autos, layout, checkpoint) is resolve.py's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from difflib import get_close_matches
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.config import ExchangeChoice, Quantization
from deployments.validation import describe, field_names, unknown

ENVIRONMENT_PREFIX = "MIXTRAL_"


class SettingsError(ValueError):
    """The configuration cannot be honoured. One sentence that names the field and says what to change."""


class Section(BaseModel):
    # strict: "2" and true are not numbers here. YAML and JSON have types; environment values are read as YAML.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Parallel(Section):
    tensor: int = Field(default=1, ge=1, le=64)
    data: int = Field(default=1, ge=1, le=64)
    expert: int | None = Field(default=None, ge=1, le=64)
    exchange: ExchangeChoice = "auto"
    spare_slots: int = Field(default=0, ge=0, le=64)
    standby: int = Field(default=0, ge=0, le=16)
    cpus_per_rank: float | None = Field(default=None, gt=0, le=1024)


class KVCache(Section):
    page_size: int = Field(default=16, ge=1, le=4096)
    memory: int | None = Field(default=None, ge=1 << 20, le=1 << 50)  # bytes
    prefix_caching: bool = True


class Scheduler(Section):
    max_running: int = Field(default=256, ge=1, le=65536)
    max_step_tokens: int = Field(default=2048, ge=1, le=1 << 20)
    max_waiting: int = Field(default=1024, ge=0, le=1 << 20)


class Limits(Section):
    request_timeout_s: float = Field(default=600, gt=0, le=86400)
    idle_timeout_s: float = Field(default=120, gt=0, le=86400)  # between two tokens of an answer
    max_body_bytes: int = Field(default=4 << 20, ge=1024, le=1 << 30)
    max_n: int = Field(default=16, ge=1, le=1024)
    max_concurrent_per_key: int | None = Field(default=None, ge=1, le=1 << 20)


class Auth(Section):
    api_keys_env: str | None = Field(default=None, min_length=1)  # name of the variable, never the key
    api_keys_file: str | None = Field(default=None, min_length=1)
    open_metrics: bool = False  # GET /metrics without a key


class Autoscaling(Section):
    min_replicas: int = Field(default=1, ge=1, le=1000)
    max_replicas: int = Field(default=1, ge=1, le=1000)
    target_ongoing_requests: float = Field(default=64, gt=0, le=1e6)


class Settings(Section):
    model: str = Field(default="demo", min_length=1)
    served_model_name: str | list[str] | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Quantization = "none"
    task: Literal["auto", "generate", "embed", "classify", "token_classify", "question_answering"] = "auto"
    parallel: Parallel = Parallel()
    max_model_len: int | None = Field(default=None, ge=1, le=1 << 24)
    kv_cache: KVCache = KVCache()
    scheduler: Scheduler = Scheduler()
    limits: Limits = Limits()
    auth: Auth = Auth()
    access_log: str | None = Field(default="stdout", min_length=1)  # stdout, a file, or nowhere
    autoscaling: Autoscaling = Autoscaling()


def load(
    args: Mapping[str, Any], environment: Mapping[str, str] | None = None, overrides: Iterable[str] = ()
) -> Settings:
    """The three sources merged and validated. `overrides` are texts like "parallel.tensor=2"."""
    merged = deepcopy(dict(args))
    for name, path, text in _from_environment(environment or {}):
        _put(merged, path, _scalar(name, text))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise SettingsError(f"--set {override}: write it as PATH=VALUE, for example parallel.tensor=2.")
        _put(merged, name.split("."), _scalar(name, text))
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        raise SettingsError(describe(error, Settings)[1]) from None
    if settings.autoscaling.min_replicas > settings.autoscaling.max_replicas:
        raise SettingsError(
            f"autoscaling.min_replicas {settings.autoscaling.min_replicas} is above "
            f"max_replicas {settings.autoscaling.max_replicas}; raise max_replicas or lower min_replicas."
        )
    return settings


def _from_environment(environment: Mapping[str, str]) -> Iterable[tuple[str, list[str], str]]:
    """(variable, path, text) of each variable that sets a field.

    A misspelt field is refused. A variable that resembles none is left alone: Kubernetes puts
    MIXTRAL_PORT_8000_TCP and the like into every pod beside a Service named mixtral.
    """
    for name, text in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        path = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        valid = field_names(Settings, path[:-1])
        if path[-1] in valid:
            yield name, path, text
        elif len(path) > 1:
            wrong, possible = (path[-1], valid) if valid else (path[0], field_names(Settings, []))
            raise SettingsError(unknown(name, wrong, possible))
        elif nearest := get_close_matches(path[0], valid, n=1, cutoff=0.75):
            raise SettingsError(f"{name} is not a field; did you mean {ENVIRONMENT_PREFIX}{nearest[0].upper()}?")


def _scalar(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"{name}: {text[:60]!r} is not a YAML value; put text in quotes.") from None


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, step in enumerate(path[:-1], start=1):
        below = tree.setdefault(step, {})
        if not isinstance(below, dict):
            raise SettingsError(f"{'.'.join(path[:depth])} must be a mapping to set {'.'.join(path)} in it.")
        tree = below
    tree[path[-1]] = value


def environment() -> Mapping[str, str]:
    """The process's environment; read nowhere else, so that nothing below settings depends on it."""
    return os.environ
