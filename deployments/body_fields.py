"""What request bodies are made of: their base, how one is read, and the forms in which clients write one thing.

A field is honoured, or accepted at the value at which it asks for nothing (`neutral`), or refused by name;
none is silently ignored. null always means "not given". Knows no route.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from deployments.errors import invalid
from deployments.validation import describe

MAX_PROMPTS = 1024  # of one request; each is a request of its own to the engine
MAX_TOKEN_ID = (1 << 31) - 1  # of any tokenizer; which ids this one has is checked later

Neutral = Mapping[str, tuple[object, ...]]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


BodyT = TypeVar("BodyT", bound=Body)


def parse(kind: type[BodyT], fields: Mapping[str, Any]) -> BodyT:
    """The body as `kind`, or a 400 that names the first field that cannot be honoured."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name in [name for name in given if name in kind.neutral]:
        value = given.pop(name)
        neutral = kind.neutral[name]
        # type(): False is not the neutral value 0, whatever == says.
        if not any(value == one and (type(value) is bool) is (type(one) is bool) for one in neutral):
            allowed = f", or use {' or '.join(map(json.dumps, neutral))}" if neutral else ""
            asked = json.dumps(value)[:60]
            raise invalid(f"{name}: {asked} is not possible in this version; leave it out{allowed}.", name)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        path, message = describe(error, kind)
        raise invalid(message, path or None) from None


def _listed(value: object) -> object:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> object:
    """Text, ids, a list of texts or a list of ids, as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PROMPTS:
        raise ValueError(f"must be a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these")
    for prompt in value:
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not ids and not isinstance(prompt, str):
            raise ValueError("every prompt must be a text or a list of token ids")
    return value


def _text(content: object) -> object:
    """The text of a message; a list of text parts is joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"only parts {{type: text, text: ...}} are possible, and one of type {str(kind)[:60]!r}")
        texts.append(part["text"])
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("the text of a part must be a string")
    return "".join(texts)


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Texts = Annotated[list[StopText], BeforeValidator(_listed, json_schema_input_type=StopText | list[StopText])]
Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(
        _prompts,
        json_schema_input_type=str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)],
    ),
]


class TextPart(Body):
    """One piece of a message's content, as the schema shows it."""

    type: Literal["text"]
    text: str


MessageText = Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[TextPart])]
