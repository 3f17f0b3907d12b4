"""The published description of the API, /openapi.json, made from the request types themselves.

Honest about bodies: what it forbids is a 400, and what it allows is a 400 only where fields contradict one another or
this model. Answers are described as far as clients rely on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deployments.body_fields import Body
from deployments.chat_protocol import ChatRequest, TokenizeRequest
from deployments.pooling_protocol import ClassifyRequest, EmbeddingRequest, QuestionRequest
from deployments.protocol import CompletionRequest, DetokenizeRequest

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"

_USAGE: Json = {
    "type": "object",
    "required": ["prompt_tokens", "total_tokens"],
    "properties": {name: {"type": "integer", "minimum": 0} for name in ("prompt_tokens", "total_tokens")},
}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

# What may go wrong besides the 400 of each route, with what the statuses say.
_FAILURES = {
    "400": "The request is wrong; the message names the field.",
    "401": "No valid API key.",
    "403": "The key is not an administrator's.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "Too many requests; Retry-After says when to come back.",
    "500": "A mistake of the server.",
    "503": "Not ready, or draining; Retry-After says when to come back.",
    "504": "It took too long.",
}


def _answer(**properties: Json) -> Json:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list_of(**properties: Json) -> Json:
    return _answer(data={"type": "array", "items": _answer(**properties)}, usage=_USAGE)


_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_RATIOS: Json = {"type": "array", "items": _NUMBER}
_CHOICES: Json = {
    "type": "array",
    "items": _answer(index=_COUNT, finish_reason={"enum": ["stop", "length", "tool_calls"]}),
}
_GENERATED = _answer(id=_TEXT, object=_TEXT, created=_COUNT, model=_TEXT, system_fingerprint=_TEXT, choices=_CHOICES)
_MODEL = _answer(id=_TEXT, object=_TEXT, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT)

_EXPERT = _answer(expert=_COUNT, ranks={"type": "array", "items": _COUNT}, load=_NUMBER)
_LAYER = _answer(layer=_COUNT, imbalance=_NUMBER, experts={"type": "array", "items": _EXPERT})

_POSTS: Mapping[str, tuple[str, type[Body], Json]] = {
    "/v1/completions": ("Continue a text.", CompletionRequest, _GENERATED),
    "/v1/chat/completions": ("Answer in a conversation.", ChatRequest, _GENERATED),
    "/v1/embeddings": ("Texts to vectors.", EmbeddingRequest, _list_of(index=_COUNT, embedding={})),
    "/classify": ("Label texts.", ClassifyRequest, _list_of(index=_COUNT, label=_TEXT, num_classes=_COUNT)),
    "/token_classify": ("Label tokens.", ClassifyRequest, _list_of(index=_COUNT, tokens={"type": "array"})),
    "/question_answering": (
        "Find the answer to a question in a text.",
        QuestionRequest,
        _answer(answer=_TEXT, score=_NUMBER, start=_COUNT, end=_COUNT, usage=_USAGE),
    ),
    "/tokenize": ("Text to token ids.", TokenizeRequest, _answer(count=_COUNT, tokens={"type": "array"})),
    "/detokenize": ("Token ids to text.", DetokenizeRequest, _answer(prompt=_TEXT)),
}

_GETS: Mapping[str, tuple[str, Json]] = {
    "/v1/models": ("The model and its names.", _answer(object=_TEXT, data={"type": "array", "items": _MODEL})),
    "/v1/models/{name}": ("One of them.", _MODEL),
    "/v1/experts": (
        "Where every expert is, and its share of the rows lately.",
        _answer(placement=_COUNT, slices=_COUNT, layers={"type": "array", "items": _LAYER}, replica=_TEXT),
    ),
    "/health": ("Whether the engine can serve.", _answer(status=_TEXT)),
    "/ready": ("Whether requests should be sent here.", _answer(status=_TEXT)),
}

PATHS = (*_POSTS, *_GETS, "/v1/experts/rebalance")


def document() -> Json:
    schemas: Json = {"Error": _ERROR}
    paths: Json = {}
    for path, (summary, body, answer) in _POSTS.items():
        content = {"application/json": {"schema": _schema(body, schemas)}}
        paths[path] = {"post": _operation(summary, answer) | {"requestBody": {"required": True, "content": content}}}
    for path, (summary, answer) in _GETS.items():
        paths[path] = {"get": _operation(summary, answer)}
    moved = _answer(placement=_COUNT, moves=_COUNT, imbalance_before=_RATIOS, imbalance_after=_RATIOS, replica=_TEXT)
    paths["/v1/experts/rebalance"] = {"post": _operation("Move experts to where they are used.", moved)}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]
    for probe in ("/health", "/ready"):  # what they say when it is not well is said in their own form
        paths[probe]["get"]["responses"]["503"] = paths[probe]["get"]["responses"]["200"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        events = {"schema": _answer(data=_TEXT) | {"description": "With stream: true. Each event's data is a chunk."}}
        paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"] = events
    return {
        "openapi": "3.1.0",
        "info": {"title": "mixtral-serve", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(summary: str, answer: Json) -> Json:
    failed = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    failures = {status: {"description": why, "content": failed} for status, why in _FAILURES.items()}
    succeeded = {"200": {"description": "The answer.", "content": {"application/json": {"schema": answer}}}}
    return {"summary": summary, "security": [{}, {"key": []}], "responses": succeeded | failures}


def _schema(body: type[Body], schemas: Json) -> Json:
    """Of one body; the types within it go into `schemas`. Neutral fields are there at the values they may have."""
    schema = body.model_json_schema(by_alias=True, ref_template=_REF)
    schemas |= schema.pop("$defs", {})
    for name, values in body.neutral.items():
        schema["properties"][name] = {"enum": [*values, None]}
    return json.loads(json.dumps(schema))  # type: ignore[no-any-return]  # shares nothing with pydantic's own
