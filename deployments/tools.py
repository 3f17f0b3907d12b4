"""Functions a model may call: how clients describe them, and the grammar of a call in Mistral's format.

    [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]

Where a call is required, the prompt ends with the marker and the grammar is the list. Where it is left to the model and
a function is strict, the grammar is any text, or the marker as the one token it is and then the list.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.messages import Grammar
from deployments.body_fields import Body
from deployments.errors import invalid
from deployments.structure import Schema, canonical

MARKER = "[TOOL_CALLS]"
MAX_TOOLS = 128
ID_LENGTH = 9  # Mistral's templates refuse any other
_ID_CHARACTERS = string.ascii_letters + string.digits

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(Body):
    name: FunctionName
    description: str = ""
    parameters: Schema = Field({})
    strict: bool = False


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As templates know it: OpenAI's form, with nothing left out that one might look for."""
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        return {
            "type": "function",
            "function": {"name": function.name, "description": function.description, "parameters": parameters},
        }


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def calls_grammar(tools: Sequence[Tool], *, at_most_one: bool) -> Grammar:
    """The list of calls, of these tools only."""
    return Grammar("json_schema", canonical(_calls_schema(tools, at_most_one=at_most_one)))


def text_or_calls_grammar(tools: Sequence[Tool], marker_id: int, text: Grammar | None, *, at_most_one: bool) -> Grammar:
    """A text, of any form or of the given one, or the marker and then calls."""
    calls = canonical(_calls_schema(tools, at_most_one=at_most_one))
    return Grammar("lark", f"start: text | calls\n{_text_rule(text)}\ncalls: <[{marker_id}]> / ?/ %json {calls}\n")


def _text_rule(text: Grammar | None) -> str:
    match text:
        case None:
            return "text: /(.|\\n)*/"
        case Grammar(kind="json_schema", text=schema):
            return f"text: %json {schema}"
        case Grammar(kind="json_object"):
            return 'text: %json {"type":"object"}'
        case Grammar(kind="choice", text=choices):
            return "text: " + " | ".join(canonical(choice) for choice in json.loads(choices))
        case _:
            raise invalid(
                "structured_outputs: a regex or grammar is not possible beside tools; use json or choice, "
                "or tool_choice none.",
                "structured_outputs",
            )


def _calls_schema(tools: Sequence[Tool], *, at_most_one: bool) -> dict[str, Any]:
    definitions = {f"arguments{index}": _parameters(tool, f"arguments{index}") for index, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": {"$ref": f"#/$defs/arguments{index}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return schema | ({"maxItems": 1} if at_most_one else {})


def _parameters(tool: Tool, name: str) -> Any:
    """The schema of a function's arguments, whose references to itself lead to its new place."""
    return _moved({"type": "object"} | tool.function.parameters, f"#/$defs/{name}")


def _moved(schema: Any, root: str) -> Any:
    match schema:
        case dict():
            return {
                key: root + value[1:]
                if key == "$ref" and isinstance(value, str) and value.startswith("#")
                else _moved(value, root)
                for key, value in schema.items()
            }
        case list():
            return [_moved(item, root) for item in schema]
        case _:
            return schema


def new_call_id() -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(ID_LENGTH))


def template_call_id(call_id: str) -> str:
    """The id if Mistral's templates take it, else one that is the same for the same id."""
    if len(call_id) == ID_LENGTH and call_id.isascii() and call_id.isalnum():
        return call_id
    return sha256(call_id.encode()).hexdigest()[:ID_LENGTH]
