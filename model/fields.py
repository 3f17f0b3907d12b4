"""Reading a JSON object of settings, field by field: each one typed, bounded, and named when it is wrong.

Knows nothing of Mixtral. A field that is absent or null takes its default. What nobody took is left over, so that
the reader can say which fields it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from model.errors import ConfigError, ModelError

MAX_JSON_BYTES = 4 << 20
LARGEST = 1e30  # JSON as Python reads it also writes NaN, Infinity and integers of a thousand digits


class Fields:
    """`spelling` maps the names we use to the names the file uses, where they differ."""

    def __init__(self, raw: Mapping[str, Any], source: str, spelling: Mapping[str, str] | None = None) -> None:
        self._raw = raw
        self._source = source
        self._spelling = spelling or {}
        self._taken: set[str] = set()

    def raw(self, name: str) -> Any:
        """The value as it stands, None where absent. Counts as taken."""
        spelled = self._spelling.get(name, name)
        self._taken.add(spelled)
        return self._raw.get(spelled)

    def absent(self, name: str) -> bool:
        return self._spelling.get(name, name) not in self._raw

    def integer(self, name: str, default: int, *, low: int = 1, high: int) -> int:
        value = self.optional_integer(name, low=low, high=high)
        return default if value is None else value

    def optional_integer(self, name: str, *, low: int = 1, high: int) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"must be a whole number from {low} to {high}, not {shown(value)}")
        return value

    def integers(self, name: str, default: tuple[int, ...], *, high: int) -> tuple[int, ...]:
        """One number or a list of them."""
        value = self.raw(name)
        if value is None:
            return default
        listed = value if isinstance(value, list) else [value]
        if len(listed) > 64 or not all(type(x) is int and 0 <= x <= high for x in listed):
            self.refuse(name, f"must be a token id or a short list of them, each from 0 to {high}, not {shown(value)}")
        return tuple(listed)

    def number(self, name: str, default: float | None, *, above: float = 0.0) -> float:
        value = self.optional_number(name, above=above)
        if value is None:
            value = default
        if value is None:
            self.refuse(name, "is missing")
        return value

    def optional_number(self, name: str, *, above: float = 0.0) -> float | None:
        value = self.raw(name)
        if value is None:
            return None
        if not is_number(value) or not above < value < LARGEST:
            self.refuse(name, f"must be a number above {above:g}, not {shown(value)}")
        return float(value)

    def numbers(self, name: str, *, length: int) -> tuple[float, ...]:
        value = self.raw(name)
        if not isinstance(value, list) or len(value) != length:
            self.refuse(name, f"must be a list of {length} numbers, not {shown(value)}")
        if not all(is_number(x) and 0 < x < LARGEST for x in value):
            self.refuse(name, "must hold numbers above 0")
        return tuple(float(x) for x in value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, f"must be true or false, not {shown(value)}")
        return value

    def choice(self, name: str, default: str | None, allowed: tuple[str, ...]) -> str | None:
        value = self.raw(name)
        if value is None:
            return default
        if value not in allowed:
            self.refuse(name, f"must be one of {', '.join(allowed)}, not {shown(value)}")
        assert isinstance(value, str)
        return value

    def table(self, name: str) -> dict[str, Any]:
        """A nested object; empty where absent."""
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(name, f"must be an object, not {shown(value)}")
        return value

    def nested(self, name: str, table: dict[str, Any]) -> Fields:
        """A reader of an object inside this one; its errors say where it lies."""
        return Fields(table, f"{self._source}: {name}")

    def only(self, name: str, *neutral: object) -> None:
        """A field we do not implement: acceptable while it says nothing."""
        value = self.raw(name)
        if value is not None and value not in neutral:
            self.refuse(name, f"is {shown(value)}, which is not supported; only {shown(neutral[0])} is")

    def present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the names that the object has. They count as taken."""
        self._taken.update(names)
        return tuple(name for name in names if name in self._raw)

    def left_over(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._raw) - self._taken))

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ConfigError(f"{self._source}: {self._spelling.get(name, name)} {why}")


def is_number(value: object) -> bool:
    return type(value) in (int, float)  # exactly: JSON's true is no 1


def shown(value: object) -> str:
    """A value in an error message: as JSON writes it, and short whatever the file held."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(
    path: Path, error_type: type[ModelError] = ConfigError, *, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise error_type(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise error_type(f"{path} is larger than {max_bytes} bytes, which no such file needs")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise error_type(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise error_type(f"{path} must hold a JSON object")
    return value
