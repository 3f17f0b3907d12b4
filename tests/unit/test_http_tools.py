"""Tools: Mistral's format read from a stream, OpenAI's deltas written, and the history."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.tool_parser import ToolCallParser
from deployments.tools import MARKER, template_call_id
from tests.unit.fake_engine import MODEL, FakeEngine, http, openai, spelling

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": {}}},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
CALL = f'{MARKER} [{{"name": "weather", "arguments": {{"city": "Paris"}}}}]'
TWO_CALLS = f'{MARKER} [{{"name": "weather", "arguments": {{"city": "a]"}}}}, {{"arguments": {{}}, "name": "clock"}}]'

TEXTS = {
    CALL: ("", [("weather", '{"city": "Paris"}')]),
    TWO_CALLS: ("", [("weather", '{"city": "a]"}'), ("clock", "{}")]),
    f'I look.  {MARKER}[{{"name":"f","arguments":{{"a":"\\"}}\\\\"}} , "id": "x"}}]  ': (
        "I look.",
        [("f", '{"a":"\\"}\\\\"}')],
    ),
    f'{MARKER} [{{"name": "f"}}]': ("", [("f", "{}")]),
    "No [TOOL here,  [TOOL_ ": ("No [TOOL here,  [TOOL_ ", []),
    f"{MARKER} none": (" none", []),
    f'{MARKER} [{{"tool": 1}}] x': ('{"tool": 1}] x', []),
    f'{MARKER} [{{"name" 3}}]': ('{"name" 3}]', []),
    f'{MARKER} [{{"name": "f"]': ('{"name": "f"]', []),
    f'{MARKER} [{{"name": 3, "arguments": {{}}}}]': ('{"name": 3, "arguments": {}}]', []),
    f'{MARKER} [{{"name": "f", "arguments": {{"a": ': ("", [("f", '{"a": ')]),
    f'{MARKER} [{{"na': ('{"na', []),
    f'{MARKER} [{{"name": "f", "arguments": {{}}}} and': (" and", [("f", "{}")]),
}


def read(pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(**options)
    content = ""
    calls: list[list[str]] = []
    for number, piece in enumerate([*pieces, ""]):
        given = parser.push(piece, last=number == len(pieces))
        content += given.content
        for delta in given.calls:
            if "id" in delta:
                assert delta["index"] == len(calls)
                assert len(delta["id"]) == 9
                calls.append([delta["function"]["name"], delta["function"]["arguments"]])
            else:
                calls[delta["index"]][1] += delta["function"]["arguments"]
    assert parser.num_calls == len(calls)
    return content, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("text", TEXTS)
def test_calls_in_a_text(text: str) -> None:
    assert read([text]) == TEXTS[text]


@given(text=st.sampled_from(list(TEXTS)), cuts=st.lists(st.integers(0, 60), max_size=10))
def test_it_does_not_matter_how_the_text_comes(text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    assert read([text[start:end] for start, end in pairwise(edges)]) == TEXTS[text]


@given(
    calls=st.lists(
        st.tuples(
            st.from_regex("[a-z_]{1,8}", fullmatch=True),
            st.dictionaries(
                st.text(max_size=4), st.integers() | st.text(max_size=6) | st.lists(st.booleans()), max_size=3
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    indent=st.sampled_from([None, 1]),
)
def test_whatever_a_model_may_call(calls: list[tuple[str, dict[str, Any]]], indent: int | None) -> None:
    text = MARKER + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], indent=indent)
    content, found = read(list(text))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_arguments_go_out_as_they_come() -> None:
    parser = ToolCallParser()
    deltas = [parser.push(character).calls for character in CALL]
    pieces = [delta["function"]["arguments"] for step in deltas for delta in step if "id" not in delta]
    assert len(pieces) > 10


def test_only_one_call_where_no_more_are_wanted() -> None:
    assert read([TWO_CALLS], max_calls=1) == ("", [("weather", '{"city": "a]"}')])


def test_a_prompt_that_ends_with_the_marker() -> None:
    assert read([CALL.removeprefix(MARKER)], in_calls=True) == TEXTS[CALL]


async def ask(engine: FakeEngine, **fields: Any) -> Any:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "tools": [WEATHER, CLOCK]}
    async with http(engine) as client:
        response = await client.post("/v1/chat/completions", json=body | fields)
    return response.json()


def prompt(engine: FakeEngine) -> str:
    return engine.tokenizer.decode(engine.requests[-1].prompt_ids)


async def test_a_call() -> None:
    engine = FakeEngine(spelling(CALL), max_model_len=1000)
    answer = await ask(engine)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert '"name": "weather"' in prompt(engine)
    assert '"properties": {}' in prompt(engine)
    assert not engine.requests[0].sampling.skip_special_tokens  # the marker must be seen
    assert engine.requests[0].sampling.grammar is None


async def test_a_text_where_it_might_have_called() -> None:
    answer = await ask(FakeEngine(spelling("Hello"), max_model_len=1000))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_a_cut_call_says_so() -> None:
    answer = await ask(FakeEngine(spelling(CALL[:40], finish_reason="length"), max_model_len=1000))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"


async def test_calls_are_streamed_as_openai_streams_them() -> None:
    client = openai(FakeEngine(spelling(TWO_CALLS), max_model_len=1000))
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "a"}],
        tools=[WEATHER, CLOCK],  # type: ignore[list-item]
        stream=True,
    )
    arguments = ["", ""]
    names = []
    reasons = []
    async for chunk in stream:
        [choice] = chunk.choices
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.id is not None:
                assert call.type == "function"
                names.append(call.function.name)
            arguments[call.index] += call.function.arguments or ""
    assert names == ["weather", "clock"]
    assert [json.loads(text) for text in arguments] == [{"city": "a]"}, {}]
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


async def test_several_choices_call_on_their_own() -> None:
    answer = await ask(FakeEngine(spelling(CALL, "no"), max_model_len=1000), n=2)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["tool_calls", "stop"]
    assert answer["choices"][1]["message"]["content"] == "no"


@pytest.mark.parametrize(
    ("choice", "reason", "functions"),
    [
        ("required", "tool_calls", ["weather", "clock"]),
        ({"type": "function", "function": {"name": "weather"}}, "stop", ["weather"]),
    ],
)
async def test_a_forced_call(choice: Any, reason: str, functions: list[str]) -> None:
    engine = FakeEngine(spelling(CALL.removeprefix(MARKER)), max_model_len=1000)
    answer = await ask(engine, tool_choice=choice)
    assert answer["choices"][0]["finish_reason"] == reason
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert prompt(engine).endswith(MARKER)
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    schema = json.loads(grammar.text)
    assert [one["properties"]["name"]["const"] for one in schema["items"]["anyOf"]] == functions
    assert "maxItems" not in schema


async def test_no_call_is_no_tools() -> None:
    engine = FakeEngine(spelling(CALL), max_model_len=1000)
    answer = await ask(engine, tool_choice="none")
    assert answer["choices"][0]["message"]["content"] == CALL
    assert "weather" not in prompt(engine)


async def test_one_call_at_a_time() -> None:
    answer = await ask(FakeEngine(spelling(TWO_CALLS), max_model_len=1000), parallel_tool_calls=False)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    engine = FakeEngine(spelling("[]"), max_model_len=1000)
    await ask(engine, parallel_tool_calls=False, tool_choice="required")
    assert json.loads(engine.requests[0].sampling.grammar.text)["maxItems"] == 1  # type: ignore[union-attr]


async def test_a_template_without_tools_says_so() -> None:
    engine = FakeEngine(max_model_len=1000, knows_tools=False)
    answer = await ask(engine)
    assert answer["error"]["param"] == "tools"
    assert "template of this model knows no tools" in answer["error"]["message"]
    assert (await ask(engine, tool_choice="none"))["object"] == "chat.completion"
    call = {"id": "abcDEF123", "function": {"name": "weather", "arguments": "{}"}}
    history = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "a"}]
    answer = await ask(engine, tools=[], messages=history)
    assert answer["error"]["param"] == "messages"  # what was called would be lost in silence


async def test_the_history_holds_calls_and_results() -> None:
    engine = FakeEngine(spelling(CALL), max_model_len=2000)
    first = (await ask(engine))["choices"][0]["message"]
    [call] = first["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain", "name": "weather"}
    await ask(engine, messages=[{"role": "user", "content": "a"}, first, result])
    assert f'"id": "{call["id"]}"' in prompt(engine)
    assert f'"tool_call_id": "{call["id"]}"' in prompt(engine)
    assert '"arguments": {"city": "Paris"}' in prompt(engine)  # an object, as templates want it
    assert "<tool>rain" in prompt(engine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [CLOCK, CLOCK]}, "same name"),
        ({"tools": [], "tool_choice": "required"}, "no such function"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "no such function"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "cannot also follow"),
        ({"tool_choice": "perhaps"}, "'required'"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
        ({"tools": [CLOCK] * 129}, "at most 128"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "[1]"}}],
                    }
                ]
            },
            "the text of a JSON object",
        ),
    ],
)
async def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    assert message in (await ask(FakeEngine(max_model_len=1000), **fields))["error"]["message"]


def test_ids_fit_the_templates() -> None:
    assert template_call_id("abcDEF123") == "abcDEF123"
    long = template_call_id("call_0123456789")
    assert long == template_call_id("call_0123456789") != template_call_id("call_0123456780")
    assert len(long) == 9
    assert long.isalnum()
