"""Request bodies: the fields we honour, with their types and bounds, and those we only know.

A field is honoured, or accepted at the value at which it asks for nothing (`neutral`), or refused by name;
none is silently ignored. null always means "not given". docs/openai.md is the same list for people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from deployments.errors import invalid
from deployments.validation import describe

MAX_PROMPTS = 1024  # of one request; each is a request of its own to the engine
MAX_STOPS = 16

Neutral = Mapping[str, tuple[object, ...]]

_NEUTRAL: Neutral = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "echo": (False,),
    "priority": (0,),
    "cache_salt": (),
    "return_token_ids": (False,),
    "return_routing": (False,),
    "structured_outputs": (),
}

COMPLETION_NEUTRAL: Neutral = {**_NEUTRAL, "best_of": (1,), "logprobs": (), "suffix": ("",)}

CHAT_NEUTRAL: Neutral = {
    **_NEUTRAL,
    "add_special_tokens": (False,),  # the chat template writes them
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": ({"mode": "implicit"},),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# Fields about the caller's account with a hosted service: any value of their type is fine, there is nothing to do.
NOTHING_TO_DO = ("user", "metadata", "prompt_cache_key", "safety_identifier")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    neutral: ClassVar[Neutral] = {}


BodyT = TypeVar("BodyT", bound=Body)


def parse(kind: type[BodyT], fields: dict[str, Any]) -> BodyT:
    """The body as `kind`, or a 400 that names the first field that cannot be honoured."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name in [name for name in given if name in kind.neutral]:
        value = given.pop(name)
        neutral = kind.neutral[name]
        # type(): False is not the neutral value 0, whatever == says.
        if not any(value == one and (type(value) is bool) is (type(one) is bool) for one in neutral):
            allowed = " or ".join(["leave it out", *(f"use {json.dumps(one)}" for one in neutral)])
            raise invalid(f"{name}: {json.dumps(value)[:60]} is not possible in this version; {allowed}.", name)
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


def _template_role(role: str) -> str:
    """OpenAI's newer name for the system role; templates know only the old one."""
    return "system" if role == "developer" else role


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Message(Body):
    role: Annotated[Literal["system", "developer", "user", "assistant"], AfterValidator(_template_role)]
    content: Annotated[str, BeforeValidator(_text)]

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, fields: object) -> object:
        """Clients send back whole answers, with null and empty fields in them: those say nothing."""
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None and value != []}
        for name in ("name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations"):
            if name in given:
                raise ValueError(f"{name} is not possible in this version; leave it out")
        return given


class GenerationRequest(Body):
    """What /v1/completions and /v1/chat/completions share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = Field(None, description="`include_usage`; only with `stream`")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 31, description="extension; 0 or -1: off")
    min_p: float = Field(0.0, ge=0, le=1, description="extension")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, description="same seed and same prompt: same answer")
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_listed)] = Field(
        [], max_length=MAX_STOPS, description=f"a text or up to {MAX_STOPS} of them; never part of the answer"
    )
    stop_token_ids: list[int] = Field([], max_length=64, description="extension")
    ignore_eos: bool = Field(False, description="extension")
    request_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._:-]{1,64}$", description="extension; becomes part of the answer's `id`"
    )
    user: str = ""
    metadata: dict[str, str] = {}
    prompt_cache_key: str = ""
    safety_identifier: str = ""

    @property
    def max_new_tokens(self) -> int | None:
        """None: as many as fit."""
        return self.max_tokens

    @model_validator(mode="after")
    def _consistent(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only possible with stream: true")
        return self


class CompletionRequest(GenerationRequest):
    neutral: ClassVar[Neutral] = COMPLETION_NEUTRAL

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)] = Field(
        description=f"a text, token ids, or a list of up to {MAX_PROMPTS} of these: one choice each"
    )
    max_tokens: int | None = Field(16, ge=1, description="16 when not given")
    add_special_tokens: bool = Field(True, description="extension; the tokenizer's own `<s>` before a text")


class ChatRequest(GenerationRequest):
    neutral: ClassVar[Neutral] = CHAT_NEUTRAL

    messages: list[Message] = Field(min_length=1, max_length=4096, description="text only")
    max_tokens: int | None = Field(None, ge=1, description="older name of `max_completion_tokens`")
    max_completion_tokens: int | None = Field(None, ge=1, description="as many as fit when not given")

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _one_maximum(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=4096)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeRequest:
        if (self.prompt is None) is (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]
