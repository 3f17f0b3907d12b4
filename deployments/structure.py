"""What an answer shall look like: OpenAI's response_format and the structured_outputs extension, as one Grammar.

    response_format     {type: json_object} | {type: json_schema, json_schema: {name, schema, strict}}
    structured_outputs  {json: schema} | {json_object: true} | {regex: ...} | {choice: [...]} | {grammar: lark}

Whether a grammar can be compiled is the engine's to say.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cluster.messages import Grammar
from deployments.body_fields import Body

MAX_GRAMMAR = 1 << 18  # characters; compiling takes time that grows with them
MAX_CHOICES = 1024


def _schema(value: object) -> object:
    """A JSON schema, perhaps as the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("must be a JSON schema, and this text is not JSON") from None
    return value


def canonical(value: object) -> str:
    """One text for one JSON value. The order of properties stays: answers are written in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    if len(canonical(schema)) > MAX_GRAMMAR:
        raise ValueError(f"the schema is longer than {MAX_GRAMMAR} characters; send a smaller one")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_bounded)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]


class JsonSchemaFormat(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Schema = Field(alias="schema")
    strict: bool = True  # it always is followed to the letter
    description: str = ""


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is required with type json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema belongs to type json_schema, not {self.type}")
        return self

    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            return Grammar("json_schema", canonical(self.json_schema.schema_))
        return Grammar("json_object", "") if self.type == "json_object" else None


class StructuredOutputs(Body):
    json_: Annotated[Schema, BeforeValidator(_schema, json_schema_input_type=dict[str, Any])] | None = Field(
        None, alias="json"
    )
    json_object: Literal[True] | None = None
    regex: GrammarText | None = None
    choice: Annotated[list[GrammarText], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: GrammarText | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of json, json_object, regex, choice, grammar")
        return self

    def compiled(self) -> Grammar:
        if self.json_ is not None:
            return Grammar("json_schema", canonical(self.json_))
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", canonical(self.choice))
        if self.grammar is not None:
            return Grammar("lark", self.grammar)
        return Grammar("json_object", "")
