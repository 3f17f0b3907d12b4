"""What calls are constrained to: strict functions to the letter, others as far as it can be done."""

from __future__ import annotations

import datetime
import ipaddress
import json
import pathlib
import uuid
from typing import Annotated, Any, Literal

import pydantic
import pytest

from cluster.errors import EngineNotReady, RequestInvalid
from cluster.messages import Grammar
from deployments.tool_grammar import calls_grammar, text_or_calls_grammar
from deployments.tools import MARKER, Tool
from model.detokenizer import Vocabulary
from model.errors import GrammarError
from model.grammar import GrammarCompiler
from tests.unit.fake_engine import MODEL, FakeEngine, http, spelling

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": {}}},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}

TOKENS = (b"<unk>", b"<s>", b"</s>", MARKER.encode(), *(bytes([value]) for value in range(256)))
COMPILER = GrammarCompiler(Vocabulary(TOKENS, frozenset(range(4)), False, True), [2], len(TOKENS))


def accepts(grammar: Grammar, text: str, marker: bool = False) -> bool:
    """Whether a model may write all of the text and end there."""
    matcher = COMPILER.compile(grammar.kind, grammar.text).matcher()
    try:
        matcher.replay([3] * marker + [4 + value for value in text.encode()])
    except GrammarError:
        return False
    return bool(int.from_bytes(matcher.mask(), "little") & 1 << 2)


TOOLS = [Tool.model_validate(tool) for tool in (WEATHER, CLOCK)]
SHAPES = [Tool.model_validate({
    "type": "function",
    "function": {
        "name": "draw",
        "parameters": {
            "properties": {"to": {"$ref": "#/$defs/Point"}, "again": {"$ref": "#"}},
            "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
            "required": ["to"],
        },
    },
})]  # fmt: skip


def test_the_grammar_of_a_call() -> None:
    grammar = calls_grammar(TOOLS, at_most_one=True)
    assert accepts(grammar, '[{"name": "weather", "arguments": {"city": 1}}]')
    assert accepts(grammar, '[{"name": "clock", "arguments": {}}]')
    assert not accepts(grammar, '[{"name": "other", "arguments": {}}]')
    assert not accepts(grammar, '[{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]')
    assert not accepts(grammar, "[]")


def test_references_within_parameters() -> None:
    grammar = calls_grammar(SHAPES, at_most_one=False)
    assert accepts(grammar, '[{"name": "draw", "arguments": {"to": {"x": 1}, "again": {"to": {"x": 2}}}}]')
    assert not accepts(grammar, '[{"name": "draw", "arguments": {"to": {"x": "1"}}}]')
    assert not accepts(grammar, '[{"name": "draw", "arguments": {"to": {"x": 1}, "again": {}}}]')


@pytest.mark.parametrize("marker_id", [3, None], ids=["token", "spelt"])
@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (None, "anything [TOOL_CALLS\nat all]", "see [TOOL_CALLS] there"),
        (Grammar("json_object", ""), '{"a": 1}', "text"),
        (Grammar("json_schema", '{"type":"integer"}'), "12", '"12"'),
        (Grammar("choice", '["yes","\\"no\\""]'), '"no"', "maybe"),
    ],
)
def test_a_text_or_a_call(form: Grammar | None, right: str, wrong: str, marker_id: int | None) -> None:
    grammar = text_or_calls_grammar(TOOLS, marker_id, form, at_most_one=False)
    marker, spelt = marker_id is not None, MARKER if marker_id is None else ""
    assert accepts(grammar, right)
    assert not accepts(grammar, wrong)
    assert accepts(grammar, spelt + ' [{"name": "clock", "arguments": {}}]', marker)
    assert not accepts(grammar, spelt + ' [{"name": "other", "arguments": {}}]', marker)
    assert not accepts(grammar, spelt + " text", marker)


@pytest.mark.parametrize("fields", [{"response_format": {"type": "json_object"}}, {}])
async def test_a_strict_function_that_need_not_be_called(fields: dict[str, Any]) -> None:
    """As clients send them that make every function strict. The fake has no token for the marker."""
    tool = with_schema({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, strict=True)
    engine, _ = await ask([tool], tool_choice="auto", **fields)
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    assert accepts(grammar, MARKER + call({"a": 1}))
    assert not accepts(grammar, MARKER + call({"a": 2}))
    assert accepts(grammar, "some text") is not bool(fields)


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class Everyday(pydantic.BaseModel):
    """Types that people describe their functions with."""

    tags: set[str]
    file: pathlib.Path
    counts: dict[Literal["a", "b"], int]
    when: datetime.datetime
    network: ipaddress.IPv4Network
    token: pydantic.SecretStr
    id: uuid.UUID
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
    word: Annotated[str, pydantic.Field(json_schema_extra={"pattern": "^(?!x)[a-z]+$"})]


ARGUMENTS = {
    "tags": ["a", "b"],
    "file": "/etc",
    "counts": {"a": 1},
    "when": "2026-01-02T03:04:05Z",
    "network": "10.0.0.0/8",
    "token": "secret",
    "id": "6f1d4b1a-0c62-4a8e-9d5a-0a8f4a3c0b11",
    "pet": {"kind": "cat", "lives": 9},
    "word": "yes",
}


def with_schema(schema: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "do", "parameters": schema, "strict": strict}}


def refuse(grammar: Grammar) -> None:
    """As the ranks do."""
    try:
        COMPILER.compile(grammar.kind, grammar.text)
    except GrammarError as error:
        raise RequestInvalid(str(error)) from None


async def ask(tools: list[dict[str, Any]], **fields: Any) -> tuple[FakeEngine, Any]:
    engine = FakeEngine(spelling("[]"), max_model_len=20_000)
    engine.refuse = refuse
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "tools": tools, "tool_choice": "required"}
    async with http(engine) as client:
        response = await client.post("/v1/chat/completions", json=body | fields)
    return engine, response.json()


def call(arguments: Any) -> str:
    return json.dumps([{"name": "do", "arguments": arguments}])


async def test_what_cannot_be_followed_of_a_schema_is_left_out() -> None:
    engine, _ = await ask([with_schema(Everyday.model_json_schema(), strict=False)])
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    assert accepts(grammar, call(ARGUMENTS))
    for name, wrong in {"tags": "a", "file": 1, "counts": {"a": "b"}, "pet": {"kind": "cow"}, "word": None}.items():
        assert not accepts(grammar, call(ARGUMENTS | {name: wrong})), name
    assert not accepts(grammar, call({}))


async def test_a_schema_that_can_be_followed_is() -> None:
    schema = {"type": "object", "properties": {"at": {"type": "string", "format": "date"}}, "required": ["at"]}
    engine, _ = await ask([with_schema(schema, strict=False)])
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    assert accepts(grammar, call({"at": "2026-01-02"}))
    assert not accepts(grammar, call({"at": "today"}))


async def test_a_schema_that_makes_no_sense_leaves_any_object() -> None:
    engine, _ = await ask([with_schema({"properties": {"a": {"$ref": "#/$defs/nowhere"}}}, strict=False)])
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    assert accepts(grammar, call({"b": [1]}))
    assert not accepts(grammar, call([1]))


async def test_a_strict_function_is_refused_by_its_name() -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    engine, answer = await ask([CLOCK, with_schema(schema, strict=False), with_schema(schema, strict=True)
                                | {"function": {"name": "strict", "parameters": schema, "strict": True}}])  # fmt: skip
    assert not engine.requests
    assert answer["error"]["param"] == "tools[2].function.parameters"
    assert "'uniqueItems' at #" in answer["error"]["message"]
    assert "strict: false" in answer["error"]["message"]


async def test_too_many_tools_together_are_refused_in_one_sentence() -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(600)}}
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": schema, "strict": True}} for i in range(2)
    ]
    _, answer = await ask(tools)
    assert answer["error"]["param"] == "tools"
    assert "1204 properties, and 1000 are allowed" in answer["error"]["message"]


async def test_an_engine_that_is_not_ready_says_so() -> None:
    engine = FakeEngine(max_model_len=1000)

    def recovering(grammar: Grammar) -> None:
        raise EngineNotReady("a rank died", retry_after_s=2)

    engine.refuse = recovering
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "tools": [CLOCK], "tool_choice": "required"}
    async with http(engine) as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
