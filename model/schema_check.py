"""Whether a JSON schema can be honoured whole, before a library sees it.

A keyword that a validator would obey and we would not is refused by name; so is one that nobody knows, because it is
most often a misspelt one. Sizes whose cost multiplies (properties, remainders) are bounded here; the library bounds
the rest. Where a schema is a hint and no promise, `enforceable` is the part of it that can be honoured. Knows nothing
of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NoReturn

from model.errors import GrammarError

MAX_DEPTH = 32  # schemas inside schemas
MAX_PROPERTIES = 1000  # of all objects together
MAX_PATTERN_PROPERTIES = 64  # likewise: each is checked against every other
MAX_PATTERNS = 500  # pattern and format
MAX_MERGED_PATTERNS = 8  # where schemas are merged, so that one string may have to match them all
MAX_REMAINDERS = 10_000  # multipleOf, of all numbers multiplied: the states of an automaton that tracks them

_ONE_SCHEMA = {"items", "additionalItems", "additionalProperties"}
_LIST_OF_SCHEMAS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
_MERGING = {"anyOf", "oneOf", "allOf", "$ref"}  # what they hold is merged with what stands beside them
_VALUES = {
    *("type", "const", "enum", "$ref", "format", "pattern", "required"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_NOTES = {  # a validator does nothing about these
    *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "example", "examples"),
    *("deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator"),
}
_KEYWORDS = _ONE_SCHEMA | _LIST_OF_SCHEMAS | _NAMED_SCHEMAS | _VALUES | _NOTES
# What the library knows; a format of anybody's own is a keyword that nobody knows.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}


def parse_json(text: str, what: str) -> Any:
    """A JSON text as Python's objects; without what only Python takes for JSON."""

    def refuse(constant: str) -> NoReturn:
        raise GrammarError(f"the {what} is not JSON: it says {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise GrammarError(f"the {what} nests too deeply: at most {MAX_DEPTH} schemas deep is allowed") from None
    except GrammarError:
        raise
    except ValueError as error:
        raise GrammarError(f"the {what} is not JSON: {error}") from None


def check_schema(schema: Any) -> dict[str, Any]:
    """The schema, if all of it can be honoured."""
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema is an object, not {json.dumps(schema)[:40]}")
    properties = pattern_properties = patterns = 0
    remainders = 1
    merges = False
    for one, path in _schemas(schema, "#", MAX_DEPTH):
        for keyword in one:
            if keyword not in _KEYWORDS:
                raise GrammarError(f"the JSON schema's keyword {keyword[:80]!r} at {path[:200]} is not supported")
        properties += len(one.get("properties", ()))
        pattern_properties += len(one.get("patternProperties", ()))
        patterns += len(one.keys() & {"pattern", "format"})
        merges |= _merges(one)
        remainders *= _remainders(one.get("multipleOf", 1))
        _refuse_more(properties, MAX_PROPERTIES, "properties")
        _refuse_more(pattern_properties, MAX_PATTERN_PROPERTIES, "patternProperties")
        _refuse_more(patterns, MAX_PATTERNS, "patterns and formats")
        _refuse_more(remainders, MAX_REMAINDERS, "multiplied multipleOf")
    if merges:
        _refuse_more(patterns, MAX_MERGED_PATTERNS, "patterns and formats, in schemas merged by allOf or siblings")
    return schema


def enforceable(schema: Any, *, patterns: bool = True) -> Any:
    """The schema without keywords and formats that cannot be honoured: it allows all that the whole one allows.

    Written for clients that describe types of their language (sets, paths, bytes) and check what they get themselves.
    What is wrong in other ways stays in it.
    """
    if not isinstance(schema, dict):
        return schema
    part: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword not in _KEYWORDS or (keyword == "pattern" and not patterns):
            continue
        if keyword == "format" and not (patterns and value in _FORMATS):
            continue
        if keyword == "oneOf":  # exclusive only where the library can prove it
            part.setdefault("anyOf", [enforceable(one, patterns=patterns) for one in _listed(value)])
        elif keyword in _NAMED_SCHEMAS and isinstance(value, dict):
            part[keyword] = {name: enforceable(one, patterns=patterns) for name, one in value.items()}
        elif keyword in _LIST_OF_SCHEMAS or (keyword == "items" and isinstance(value, list)):
            part[keyword] = [enforceable(one, patterns=patterns) for one in _listed(value)]
        else:
            part[keyword] = enforceable(value, patterns=patterns) if keyword in _ONE_SCHEMA else value
    return part


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _merges(schema: dict[str, Any]) -> bool:
    beside = schema.keys() - _MERGING - _NOTES - {"$defs", "definitions", "type"}
    merging = schema.keys() & _MERGING
    return "allOf" in merging or len(merging) > 1 or bool(merging and beside)


def _schemas(schema: Any, path: str, depth: int) -> Iterator[tuple[dict[str, Any], str]]:
    """The schema and all inside it, each with its JSON pointer."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise GrammarError(f"the JSON schema at {path[:200]} is neither an object nor true nor false")
    if depth == 0:
        raise GrammarError(f"the JSON schema nests too deeply: at most {MAX_DEPTH} schemas deep is allowed")
    yield schema, path
    for keyword, value in schema.items():
        where = f"{path}/{keyword}"
        if keyword in _NAMED_SCHEMAS:
            inner = list(_typed(value, dict, where).items())
        elif keyword in _LIST_OF_SCHEMAS or (keyword == "items" and isinstance(value, list)):
            inner = list(enumerate(_typed(value, list, where)))
        elif keyword in _ONE_SCHEMA:
            yield from _schemas(value, where, depth - 1)
            continue
        else:
            continue
        for name, one in inner:
            yield from _schemas(one, f"{where}/{name}", depth - 1)


def _typed(value: Any, kind: type, path: str) -> Any:
    if not isinstance(value, kind):
        raise GrammarError(f"the JSON schema at {path[:200]} is not {'an object' if kind is dict else 'a list'}")
    return value


def _remainders(multiple: Any) -> int:
    """How many remainders an automaton for this multipleOf tells apart: 12 for 12, 25 for 0.25."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float):
        raise GrammarError(f"the JSON schema's multipleOf is {json.dumps(multiple)[:40]}, not a number")
    number = Decimal(str(multiple))
    if not number.is_finite():
        raise GrammarError("the JSON schema's multipleOf is too large")
    digits, exponent = number.normalize().as_tuple()[1:]
    assert isinstance(exponent, int)
    return max(1, int("".join(map(str, digits)) + "0" * exponent))


def _refuse_more(number: int, most: int, what: str) -> None:
    if number > most:
        raise GrammarError(f"the JSON schema is too large: it has {number} {what}, and {most} are allowed")
