"""The grammar of an answer that may hold tool calls, in Mistral's format:

    [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]

Where a call is required, the prompt ends with the marker and the grammar is the list. Where it is left to the model and
a function is strict, the grammar is any text without a marker, or the marker and then the list. The marker is one token
where the model has it, and spelt where it has not.

A strict function's schema is followed to the letter, or the request refused by name. Of the others' schemas, what no
constrained decoding knows is left out, step by step: clients send sets, paths and look-aheads every day, and check
what they get themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import EngineError, RequestInvalid
from cluster.messages import Grammar
from deployments.chat_protocol import ChatRequest
from deployments.errors import ApiError, from_engine, invalid
from deployments.serving import Service
from deployments.structure import canonical
from deployments.tools import MARKER, Tool
from model.schema_check import enforceable

# What is asked of the arguments of functions that are not strict: the first of these that can be.
PARTS: Sequence[Callable[[dict[str, Any]], dict[str, Any]]] = (
    lambda schema: schema,
    enforceable,
    lambda schema: enforceable(schema, patterns=False),
    lambda schema: {"type": "object"},
)


async def tool_grammar(body: ChatRequest, service: Service, marker_id: int | None) -> Grammar | None:
    """Of an answer in which some of the body's tools may be called. None: it may be anything."""
    tools = body.callable_tools
    if not body.must_call and body.grammar is None and not any(tool.function.strict for tool in tools):
        return None
    refused: list[Grammar] = []
    for part in PARTS:
        grammar = _answer_grammar(body, [_with_part(tool, part) for tool in tools], marker_id)
        if grammar not in refused:
            if await _reason_against(grammar, service) is None:
                return grammar
            refused.append(grammar)
    raise await _refusal(body, refused[-1], service)


def _answer_grammar(body: ChatRequest, tools: Sequence[Tool], marker_id: int | None) -> Grammar:
    at_most_one = not body.parallel_tool_calls
    if body.must_call:
        return calls_grammar(tools, at_most_one=at_most_one)
    return text_or_calls_grammar(tools, marker_id, body.grammar, at_most_one=at_most_one)


def _with_part(tool: Tool, part: Callable[[dict[str, Any]], dict[str, Any]]) -> Tool:
    function = tool.function
    if function.strict:
        return tool
    return tool.model_copy(update={"function": function.model_copy(update={"parameters": part(function.parameters)})})


async def _reason_against(grammar: Grammar, service: Service) -> str | None:
    try:
        await service.engine.prepare(grammar, opens_text=True)
    except RequestInvalid as error:
        return str(error)
    except EngineError as error:
        raise from_engine(error, service.pace.retry_after_s) from None
    return None


async def _refusal(body: ChatRequest, grammar: Grammar, service: Service) -> ApiError:
    """By the name of what cannot be: a strict function, the form of the text, or else all of it together."""
    for index, tool in enumerate(body.tools):
        if tool.function.strict and tool in body.callable_tools:
            reason = await _reason_against(calls_grammar([tool], at_most_one=True), service)
            if reason is not None:
                name = f"tools[{index}].function.parameters"
                return invalid(f"{name}: {reason}; a strict function needs another schema, or strict: false.", name)
    if body.grammar is not None and (reason := await _reason_against(body.grammar, service)) is not None:
        return invalid(reason)
    reason = await _reason_against(grammar, service)
    assert reason is not None, "what was refused once is refused again"
    return invalid(f"tools: {reason}.", "tools")


def calls_grammar(tools: Sequence[Tool], *, at_most_one: bool) -> Grammar:
    """The list of calls, of these tools only."""
    return Grammar("json_schema", canonical(_calls_schema(tools, at_most_one=at_most_one)))


def text_or_calls_grammar(
    tools: Sequence[Tool], marker_id: int | None, text: Grammar | None, *, at_most_one: bool
) -> Grammar:
    """A text, of any form or of the given one, or the marker and then calls. marker_id: of the marker's own token."""
    marker = canonical(MARKER) if marker_id is None else f"<[{marker_id}]>"
    calls = canonical(_calls_schema(tools, at_most_one=at_most_one))
    return Grammar("lark", f"start: text | calls\n{_text_rule(text)}\ncalls: {marker} / ?/ %json {calls}\n")


def _text_rule(text: Grammar | None) -> str:
    match text:
        case None:
            return f"text: TEXT\nTEXT: /(.|\\n)*/ & ~/(.|\\n)*{re.escape(MARKER)}(.|\\n)*/"
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
