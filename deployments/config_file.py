"""serve_config.yaml as `mixtral-serve serve` reads it: where to listen, and the arguments of one application.

The same file goes to `serve run`, which knows more of it; what only that command honours is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from deployments.settings import Section, SettingsError
from deployments.validation import describe

IMPORT_PATH = "deployments.app:build"
MAX_FILE_BYTES = 1 << 20


class HttpOptions(Section):
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=1, le=65535)


class ApplicationEntry(Section):
    import_path: str
    name: str = Field(default="mixtral", min_length=1)
    route_prefix: str = Field(default="/", pattern="^/")
    args: dict[str, Any] = Field(default={})


class ConfigFile(Section):
    http_options: HttpOptions = HttpOptions()
    applications: list[ApplicationEntry] = Field(
        default=[ApplicationEntry(import_path=IMPORT_PATH)], min_length=1, max_length=1
    )

    @property
    def application(self) -> ApplicationEntry:
        return self.applications[0]


def read_config_file(path: Path | None) -> ConfigFile:
    """None: no file, so the built-in demo on port 8000."""
    if path is None:
        return ConfigFile()
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.safe_load(file.read(MAX_FILE_BYTES))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    try:
        config = ConfigFile.model_validate({} if content is None else content)
    except ValidationError as error:
        raise SettingsError(
            f"{path}: {describe(error, ConfigFile)[1]} If `serve run` knows it, use that command."
        ) from None
    if config.application.import_path != IMPORT_PATH:
        raise SettingsError(
            f"{path}: import_path is {config.application.import_path}, not {IMPORT_PATH}; start it with `serve run`."
        )
    return config
