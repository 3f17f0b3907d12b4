"""What a request asks of its answer, in the library's language, or one sentence about why that cannot be.

    json_schema, json_object   the schema, with the white space we allow
    regex, choice              a Lark grammar of one terminal
    lark                       the grammar itself, without what would reach past the text (token ids, sampling options)

Cheap refusals come first: sizes, syntax, what is not supported. Knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Literal

from model.errors import GrammarError
from model.schema_check import check_schema, parse_json

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

# Compile time grows with these, and the depth of the library's recursion too (see grammar.py).
MAX_LENGTH: dict[GrammarKind, int] = {
    "json_schema": 65536,
    "json_object": 0,
    "regex": 16384,
    "choice": 65536,
    "lark": 16384,
}

# Room for pretty-printing, but not for a model that writes spaces until its last token.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \t\n\r]{1,32}", "lenient": False}

_LARK_PIECE = re.compile(
    r"""(?P<plain> \#[^\n]* | //[^\n]* | "(?:\\.|[^"\\])*" | /(?:\\.|[^/\\])+/ )
      | (?P<json> %json )
      | (?P<options> %llguidance \s* \{ \s* [^\s}] )
      | (?P<token> <[^<>\s]+> )
      | (?P<grammar> @[\w-]+ )
      | (?P<sampling> \b(?:stop|temperature)\s*= )""",
    re.VERBOSE | re.DOTALL,
)
_REFUSED = {
    "options": "%llguidance options are not supported: leave them out",
    "token": "tokens cannot be named ({}): write the text they stand for",
    "grammar": "there is no other grammar to refer to ({})",
    "sampling": "the option {} is not supported: it would change sampling, not the text",
}


def library_grammar(kind: GrammarKind, text: str, markers: Collection[int]) -> dict[str, Any]:
    """One entry of the library's list of grammars. markers: ids of control tokens that Lark may name, as <[5]>."""
    if len(text) > MAX_LENGTH[kind]:
        raise GrammarError(f"the {kind} has {len(text)} characters, and {MAX_LENGTH[kind]} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError(f"the {kind} has half a surrogate pair: send whole characters") from None
    match kind:
        case "json_schema":
            return {"json_schema": _json_schema(parse_json(text, "JSON schema"))}
        case "json_object":
            return {"json_schema": _json_schema({"type": "object"})}
        case "regex":
            return {"lark_grammar": _regex(text)}
        case "choice":
            return {"lark_grammar": _choice(parse_json(text, "list of choices"))}
        case "lark":
            return {"lark_grammar": _lark(text, markers)}


def _json_schema(schema: Any) -> dict[str, Any]:
    return check_schema(schema) | {"x-guidance": _JSON_OPTIONS}


def _regex(text: str) -> str:
    from llguidance import regex_to_lark

    digits = "d"  # \d is 0-9, not every script's digits
    return f"start: /{regex_to_lark(text, digits)}/" if text else 'start: ""'


def _choice(choices: Any) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise GrammarError("a choice is a list of one or more texts")
    return "start: CHOICE\nCHOICE: " + " | ".join(map(_lark_string, choices))


def _lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _lark(text: str, markers: Collection[int]) -> str:
    """The grammar with every %json schema checked and given our white space."""
    named = {f"<[{i}]>" for i in markers}
    parts: list[str] = []
    end = 0
    while piece := _LARK_PIECE.search(text, end):
        parts.append(text[end : piece.end()])
        end = piece.end()
        kind = piece.lastgroup
        assert kind is not None
        if kind in _REFUSED and piece[0] not in named:
            raise GrammarError(f"lark: {_REFUSED[kind].format(piece[0][:80])}")
        if kind == "json":
            schema, end = _leading_json(text, end)
            parts.append(f" {json.dumps(_json_schema(schema))}")
    return "".join([*parts, text[end:]])


def _leading_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends."""
    start = next((i for i in range(start, len(text)) if not text[i].isspace()), len(text))
    try:
        schema, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"lark: %json is not followed by a JSON schema: {error}") from None
    return schema, end
