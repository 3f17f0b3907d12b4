"""What of a schema can be honoured. Refusals are tested with the grammars, in test_grammar.py."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.schema_check import check_schema, enforceable

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}},
    {"type": "object", "properties": {"a": {"type": "string", "format": "path"}}, "propertyNames": {"maxLength": 3}},
    {"oneOf": [{"type": "integer"}, {"type": "number", "multipleOf": 0.5}]},
    {"not": {"type": "string"}},
    {"type": "array", "prefixItems": [{"type": "string", "format": "uri-reference"}, True], "contains": {"const": 1}},
    {"anyOf": [{"if": {"type": "integer"}, "then": {"minimum": 3}}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"x-a": 1}}},
    {"allOf": [{"type": "object", "dependentRequired": {"a": ["b"]}}], "nullable": True},
]


scalars = st.none() | st.booleans() | st.integers(0, 4) | st.sampled_from([0.5, "", "a", "a b"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "long"]), inner, max_size=2),
    max_leaves=5,
)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("patterns", [True, False])
def test_the_enforceable_part_can_be_honoured(schema: dict[str, Any], patterns: bool) -> None:
    part = enforceable(schema, patterns=patterns)
    assert check_schema(part) == part
    assert enforceable(part, patterns=patterns) == part != schema


@settings(max_examples=300)
@given(value=values, schema=st.sampled_from(SCHEMAS), patterns=st.booleans())
def test_it_allows_whatever_the_whole_allows(value: Any, schema: dict[str, Any], patterns: bool) -> None:
    def allows(one: Any) -> bool:
        return jsonschema.Draft202012Validator(one).is_valid(value)

    assert allows(enforceable(schema, patterns=patterns)) or not allows(schema)


def test_what_can_be_honoured_stays() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "format": "date", "pattern": "^2"}, "format": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": {"type": "string", "minLength": 2},
    }
    assert enforceable(schema) == schema
    without = enforceable(schema, patterns=False)
    assert without["properties"] == {"a": {"type": "string"}, "format": {"type": "integer"}}


@pytest.mark.parametrize("schema", [3, [1], {"properties": 3}, {"anyOf": {"type": "string"}}, {"items": 3}])
def test_what_is_no_schema_is_left_to_the_check(schema: Any) -> None:
    enforceable(schema)
