"""The body of /v1/chat/completions: a conversation, the functions it may call, and the fields all generation has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from deployments.body_fields import Body, MessageText, Neutral
from deployments.protocol import MAX_LOGPROBS, GenerationRequest
from deployments.tools import MAX_TOOLS, FunctionName, NamedTool, Tool, ToolChoice, template_call_id

MAX_MESSAGES = 4096

CHAT_NEUTRAL: Neutral = {
    "add_special_tokens": (False,),  # the chat template writes them
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": ({"mode": "implicit"},),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# What clients add to messages they got from us or collected from a stream; it says nothing new.
_ECHOES = {"index", "parsed", "parsed_arguments"}


def _template_role(role: str) -> str:
    """OpenAI's newer name for the system role; templates know only the old one."""
    return "system" if role == "developer" else role


def _arguments(text: str) -> str:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("must be the text of a JSON object")
    return text


class CalledFunction(Body):
    name: FunctionName
    arguments: Annotated[str, AfterValidator(_arguments)] = ""

    @model_validator(mode="before")
    @classmethod
    def _without_echoes(cls, fields: object) -> object:
        return _without(fields, _ECHOES)


class ToolCall(Body):
    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _without_echoes(cls, fields: object) -> object:
        return _without(fields, _ECHOES)

    def for_template(self) -> dict[str, Any]:
        arguments = json.loads(self.function.arguments or "{}")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": template_call_id(self.id), "type": "function", "function": function}


class Message(Body):
    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], AfterValidator(_template_role)]
    content: MessageText
    tool_calls: list[ToolCall] = Field([], max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, min_length=1, max_length=256)
    name: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _as_sent_back(cls, fields: object) -> object:
        """Clients send back whole answers, with null and empty fields in them: those say nothing."""
        given = _without(fields, _ECHOES)
        if not isinstance(given, dict):
            return fields
        given = {name: value for name, value in given.items() if value is not None and value != []}
        for name in ("function_call", "refusal", "audio", "annotations"):
            if name in given:
                raise ValueError(f"{name} is not possible in this version; leave it out")
        return {"content": ""} | given if "tool_calls" in given else given

    @model_validator(mode="after")
    def _of_its_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's; leave them out")
        if (self.role == "tool") is (self.tool_call_id is None):
            raise ValueError("tool_call_id belongs to messages of role tool, and to no others")
        if self.name is not None and self.role != "tool":
            raise ValueError("name is not possible in this version; leave it out")
        return self

    def for_template(self) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = template_call_id(self.tool_call_id)
        return turn


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(GenerationRequest):
    neutral: ClassVar[Neutral] = CHAT_NEUTRAL

    messages: Messages = Field(description="text, tool calls and their results")
    max_tokens: int | None = Field(None, ge=1, description="older name of `max_completion_tokens`")
    max_completion_tokens: int | None = Field(None, ge=1, description="as many as fit when not given")
    logprobs: bool = Field(False, description=f"completions: a number up to {MAX_LOGPROBS}; chat: true or false")
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description="only with `logprobs`")
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, description="functions, where the model's template knows them")
    tool_choice: ToolChoice = Field("auto", description="`none`, `auto`, `required`, or one function")
    parallel_tool_calls: bool = True

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def callable_tools(self) -> Sequence[Tool]:
        """What the model may call: all, none, or the one that is named."""
        match self.tool_choice:
            case "none":
                return []
            case NamedTool(function=function):
                return [tool for tool in self.tools if tool.function.name == function.name]
            case _:
                return self.tools

    @property
    def names_a_tool(self) -> bool:
        return isinstance(self.tool_choice, NamedTool)

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or self.names_a_tool

    @model_validator(mode="after")
    def _one_maximum(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only possible with logprobs: true")
        return self

    @model_validator(mode="after")
    def _possible_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name; rename one")
        if self.must_call and not self.callable_tools:
            raise ValueError("tool_choice: no such function is in tools; add it, or choose none or auto")
        if self.must_call and self.grammar is not None:
            raise ValueError("tool_choice: a call cannot also follow response_format or structured_outputs; drop one")
        return self


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeRequest:
        if (self.prompt is None) is (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.tools and self.messages is None:
            raise ValueError("tools belong to messages")
        return self


def _without(fields: object, names: set[str]) -> object:
    if not isinstance(fields, dict):
        return fields
    return {name: value for name, value in fields.items() if name not in names}
