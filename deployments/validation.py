"""What a pydantic error says to a person: one sentence that names the field, what was given and what is allowed.

Used for the configuration file and for request bodies. Knows neither.
"""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ValidationError

# What pydantic's sentences say of itself and Python's classes: the name of the field stands before them.
_OF_PYDANTIC = re.compile(r"^(Input|List|String|Dictionary) | after validation, not \d+$| or instance of \w+$")


def describe(error: ValidationError, kind: type[BaseModel]) -> tuple[str, str]:
    """The path of the first field that is wrong, and the sentence about it."""
    first = error.errors(include_url=False, include_context=False)[0]
    location = _without_union_arms(first["loc"])
    path = dotted(location)
    if first["type"] == "extra_forbidden":
        return path, unknown(path, str(location[-1]), field_names(kind, location[:-1]))
    if first["type"] == "missing":
        return path, f"{path} is required."
    if first["type"] == "value_error":  # raised by a validator of ours, whose sentence says it all
        message = first["msg"].removeprefix("Value error, ")
        return (path, f"{path}: {message}.") if path else (_begins_with(message, kind), f"{message}.")
    message = _OF_PYDANTIC.sub("", first["msg"].rstrip("."))
    return path, f"{path}: {message}, not {reprlib.repr(first['input'])}."


def _begins_with(sentence: str, kind: type[BaseModel]) -> str:
    """The field that a sentence about several begins with, if it does."""
    word = re.split(r"\W", sentence, maxsplit=1)[0]
    return word if word in field_names(kind, ()) else ""


def unknown(path: str, name: str, valid: Iterable[str]) -> str:
    """The sentence about a field that does not exist, with the nearest one that does."""
    names = list(valid)
    nearest = get_close_matches(name, names, n=1)
    if nearest:
        return f"{path} is not a field; did you mean {nearest[0]}?"
    if 0 < len(names) <= 12:
        return f"{path} is not a field; possible here: {', '.join(names)}."
    return f"{path} is not a field."


def dotted(location: Sequence[str | int]) -> str:
    """("messages", 0, "role") -> messages[0].role"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(".")


def field_names(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The fields of the model found by walking `path` from `kind`; none where the path leads out of models."""
    for step in path:
        if isinstance(step, str):
            field = kind.model_fields.get(step)
            inner = None if field is None else _model_in(field.annotation)
            if inner is None:
                return []
            kind = inner
    return [field.alias or name for name, field in kind.model_fields.items()]


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Model, Model | None and list[Model] all have one."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part)) is not None), None)


def _without_union_arms(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """pydantic names the arm of a union it tried, as in ("stop", "list[str]", 0); a person never wrote that."""
    arms = {"str", "int", "float", "bool"}
    return tuple(step for step in location if not (isinstance(step, str) and (step in arms or "[" in step)))
