"""Functions a model may call: how clients describe them, how templates are told, and what calls are marked with."""

from __future__ import annotations

import secrets
import string
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field

from deployments.body_fields import Body
from deployments.structure import Schema

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


def new_call_id() -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(ID_LENGTH))


def template_call_id(call_id: str) -> str:
    """The id if Mistral's templates take it, else one that is the same for the same id."""
    if len(call_id) == ID_LENGTH and call_id.isascii() and call_id.isalnum():
        return call_id
    return sha256(call_id.encode()).hexdigest()[:ID_LENGTH]
