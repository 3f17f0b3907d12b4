"""Grammars on the tests' own tokenizer and on Mixtral's: random answers must match, by other libraries' judgement."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from model.errors import GrammarError
from model.grammar import GrammarCompiler, InAnswers, Matcher, apply_grammars
from model.grammar_text import GrammarKind
from model.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import sentencepiece_model

EOS = 2
PADDING = 16  # logits are wider than the tokenizer
LINK = {"type": "object", "properties": {"to": {"const": "x"}}, "required": ["to"], "additionalProperties": False}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é", None, 1.5]}, "maxItems": 3},
        "id": {"type": "string", "pattern": "^[a-f]{2}-[0-9]{2,3}$"},
        "next": {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}]},
        "host": {"type": "string", "format": "ipv4"},
        "half": {"type": "number", "multipleOf": 0.5, "minimum": -3, "maximum": 3},
    },
    "required": ["name", "age", "tags", "id", "next", "host", "half"],
    "additionalProperties": False,
    "$defs": {"link": LINK},
}
REGEXES = [
    r"(a|a)*b",
    r"[0-9]{3}-\d{2,4}( x[A-F]+)?",
    r"^(yes|no|vielleicht|ça|日本)!?$",
    r" ?leading",
    r"\s*[a-zà-ü]{2,5}/[^\s/]{0,3}",
    r'"[^"\\]{0,4}"',
]
CHOICES = ["yes", "yesterday", "no", " no", "", 'a "quote" \\ and\ttab', "日本", "日本語", "é\x7f", "experts answer it"]
SUMS = r"""
start: sum
sum: term (/[+-]/ term)*  // comment with "quotes" and /slashes/
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
%ignore / /
"""


@pytest.fixture(scope="module", params=["tiny", "mixtral", "demo"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    if request.param == "tiny":
        (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    else:  # the demo's writes no space of its own before a text
        origin = "model.demo/tokenizer.model" if request.param == "demo" else "mistral_common/data/tokenizer.model.v1"
        package, _, path = origin.partition("/")
        shutil.copy(Path(str(files(package))) / path, directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.vocabulary, tokenizer.eos_ids, tokenizer.vocab_size + PADDING)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(directory)
    return GrammarCompiler(tokenizer.vocabulary, tokenizer.eos_ids, tokenizer.vocab_size + PADDING)


def allowed(matcher: Matcher) -> list[int]:
    bits: list[int] = (
        np.unpackbits(np.frombuffer(matcher.mask(), dtype=np.uint8), bitorder="little").nonzero()[0].tolist()
    )
    return bits


def walk(matcher: Matcher, tokenizer: Tokenizer, rng: random.Random, length: int = 60) -> list[int]:
    """Tokens chosen uniformly among the allowed ones; past `length`, those that end soonest."""
    closing = [b'"', b"}", b"]", b")", b":", b"1"]
    ids: list[int] = []
    while True:
        choices = allowed(matcher)
        token_id = rng.choice(choices)
        if len(ids) >= length:
            assert len(ids) < 4 * length, tokenizer.decode(ids)
            by_end = {tokenizer.token_bytes(i): i for i in choices}
            ends = [EOS] if EOS in choices else [by_end[end] for end in closing if end in by_end]
            shortest = sorted(by_end, key=lambda text: (text.isspace(), len(text)))
            token_id = ends[0] if ends else by_end[shortest[0]]
        matcher.accept(token_id)
        if token_id == EOS:
            assert matcher.finished
            return ids
        ids.append(token_id)


def is_json(schema: Any) -> Callable[[str], bool]:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    return lambda text: validator.is_valid(json.loads(text))


def is_sum(text: str) -> bool:
    number = r"\(*[0-9]{1,3}\)*"
    plain = text.replace(" ", "")
    return text.count("(") == text.count(")") and re.fullmatch(rf"{number}([+-]{number})*", plain) is not None


CASES: list[tuple[GrammarKind, str, Callable[[str], bool]]] = [
    ("json_schema", json.dumps(PERSON), is_json(PERSON)),
    ("json_object", "", is_json({"type": "object"})),
    ("choice", json.dumps(CHOICES), lambda text: text in CHOICES),
    ("lark", SUMS, is_sum),
    *[("regex", pattern, lambda text, p=re.compile(pattern): p.fullmatch(text) is not None) for pattern in REGEXES],
]


@pytest.mark.parametrize("opens_text", [False, True])
@pytest.mark.parametrize(("kind", "text", "matches"), CASES, ids=[f"{kind}-{text[:12]}" for kind, text, _ in CASES])
def test_random_answers_match(
    kind: GrammarKind,
    text: str,
    matches: Callable[[str], bool],
    opens_text: bool,
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
) -> None:
    grammar = compiler.compile(kind, text, opens_text=opens_text)
    for seed in range(5):
        ids = walk(grammar.matcher(), tokenizer, random.Random(seed))
        prompt = [] if opens_text else tokenizer.encode("A prompt.")
        decoder = tokenizer.incremental(prompt, opens_message=opens_text)
        answer = decoder.push(ids) + decoder.flush()
        assert matches(answer), (seed, answer)


def test_exactly_what_leads_to_a_choice_is_allowed(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    wanted = [choice.encode() for choice in CHOICES]
    grammar = compiler.compile("choice", json.dumps(CHOICES))
    special = tokenizer.vocabulary.special
    adds = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in special}
    for seed in range(4):
        rng, matcher, answer = random.Random(seed), grammar.matcher(), b""
        for _ in range(30):
            rests = tuple(w.removeprefix(answer) for w in wanted if w.startswith(answer))
            longer = {i for i, added in adds.items() if any(added and rest.startswith(added) for rest in rests)}
            ends = {EOS} if answer in wanted else set()
            assert set(allowed(matcher)) == longer | ends, (seed, answer)
            assert matcher.finished == (not longer)
            if not longer:
                break
            token_id = rng.choice(sorted(longer))
            matcher.accept(token_id)
            answer += adds[token_id]


def test_the_leading_space_of_a_text_of_its_own_is_no_part_of_it(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    def begins(kind: GrammarKind, text: str, opens_text: bool) -> set[bytes]:
        matcher = compiler.compile(kind, text, opens_text=opens_text).matcher()
        return {tokenizer.token_bytes(i)[:1] for i in allowed(matcher)}

    assert begins("regex", "ab", False) == {b"a"}
    assert begins("regex", "ab", True) == {b"a", b" "}
    assert begins("regex", " ab", False) == {b" "}
    assert begins("regex", " ab", True) == {b" "}
    space = next(i for i in allowed(compiler.compile("regex", " ").matcher()) if tokenizer.token_bytes(i) == b" ")
    for spaces, matches in ((0, False), (1, False), (2, True)):
        matcher = compiler.compile("regex", " (a|$)", opens_text=True).matcher()
        matcher.replay([space] * spaces)
        assert (EOS in allowed(matcher)) == matches, spaces


def test_replay_is_the_same_as_accepting_one_by_one(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile("json_schema", json.dumps(PERSON))
    ids = walk(grammar.matcher(), tokenizer, random.Random(0))
    stepwise = grammar.matcher()
    for end in range(0, len(ids), 7):
        replayed = grammar.matcher()
        replayed.replay(ids[:end])
        assert replayed.mask() == stepwise.mask()
        for token_id in ids[end : end + 7]:
            stepwise.mask()
            stepwise.accept(token_id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_lose_what_is_not_allowed(dtype: torch.dtype, tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    V = tokenizer.vocab_size + PADDING
    logits_RV = torch.randn(4, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    before_RV = logits_RV.clone()
    matchers = {row: compiler.compile("regex", pattern).matcher() for row, pattern in ((0, "[ab]+"), (2, "(?s:.)*"))}
    assert apply_grammars(logits_RV, matchers) == {}
    assert torch.equal(logits_RV[[1, 3]], before_RV[[1, 3]])
    for row, matcher in matchers.items():
        index = torch.tensor(allowed(matcher))
        assert index.max() < tokenizer.vocab_size
        assert torch.equal(logits_RV[row, index], before_RV[row, index])
        assert torch.isneginf(logits_RV[row]).sum() == V - len(index)
    assert set(allowed(matchers[2])) & tokenizer.vocabulary.special == {EOS}
    assert apply_grammars(logits_RV, {}) == {}


def test_a_row_in_trouble_leaves_the_others_alone(tiny: GrammarCompiler) -> None:
    grammar = tiny.compile("regex", "ab")
    broken, banned, sound = grammar.matcher(), grammar.matcher(), grammar.matcher()
    with pytest.raises(GrammarError, match="cannot come next"):
        broken.accept(EOS)
    logits_RV = torch.zeros(3, 400)
    logits_RV[1, allowed(banned)] = -torch.inf
    assert set(apply_grammars(logits_RV, {0: broken, 1: banned, 2: sound})) == {0}
    assert torch.isneginf(logits_RV[1]).all()
    assert torch.isfinite(logits_RV[2]).nonzero().flatten().tolist() == allowed(sound)


@pytest.mark.parametrize("token_id", [EOS, 0, 1, 383, 10**9, "b"])
def test_a_token_that_is_not_allowed_raises(token_id: int | str, tiny: GrammarCompiler) -> None:
    """What the grammar forbids, control tokens, padding; and nothing comes after that."""
    grammar = tiny.compile("regex", "ab")
    a, b = (next(i for i in allowed(tiny.compile("regex", text).matcher())) for text in "ab")
    matcher = grammar.matcher()
    with pytest.raises(GrammarError):
        matcher.accept(b if isinstance(token_id, str) else token_id)
    assert not matcher.finished
    grammar.matcher().replay([a, b, EOS])
    with pytest.raises(GrammarError):
        grammar.matcher().replay([a, b, EOS, a])


def test_what_is_no_text_is_never_allowed_whatever_the_library_says() -> None:
    class Tokens:
        tokens = (b"", b"x", b"a")
        eos_token_id = 0
        bos_token_id = None

        def __call__(self, text: bytes) -> list[int]:
            return []

    tokenizer = LLTokenizer(TokenizerWrapper(Tokens()))
    in_answers = InAnswers.of([b"", b"", b"a"], {0})
    matcher = Matcher(LLMatcher(tokenizer, 'start: <[1]> "a" | "a"'), in_answers)
    assert allowed(matcher) == [2]


def test_compiled_grammars_are_kept_and_the_oldest_forgotten(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer.vocabulary, tokenizer.eos_ids, tokenizer.vocab_size, max_cached=2)
    first, second = compiler.compile("regex", "a"), compiler.compile("regex", "b")
    assert compiler.compile("regex", "a") is first
    compiler.compile("regex", "c")
    assert compiler.compile("regex", "a") is first
    assert compiler.compile("regex", "b") is not second


def test_threads_share_a_compiler(tiny: GrammarCompiler) -> None:
    def use(n: int) -> int:
        matcher = tiny.compile("regex", f"[ab]{{{n % 4}}}").matcher()
        while EOS not in (ids := allowed(matcher)):
            matcher.accept(ids[0])
        return len(ids)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, range(64))) == [1] * 64


def test_a_model_without_an_end_of_sequence_has_no_grammars(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer.vocabulary, (), tokenizer.vocab_size)
    with pytest.raises(GrammarError, match="end of sequence"):
        compiler.validate("regex", "a")


def test_white_space_between_json_tokens_is_bounded(tiny: GrammarCompiler) -> None:
    """In a schema of its own and inside Lark: a model may not write spaces until its last token."""
    schema = '{"type": "array"}'
    bracket, space = (allowed(tiny.compile("regex", one).matcher())[0] for one in ("\\[", " "))
    cases: list[tuple[GrammarKind, str]] = [("json_schema", schema), ("lark", f"start: x\nx: %json {schema}")]
    for kind, text in cases:
        matcher = tiny.compile(kind, text).matcher()
        matcher.replay([bracket] + [space] * 32)
        with pytest.raises(GrammarError):
            matcher.accept(space)


def test_lark_may_name_the_marker_of_tool_calls_and_no_other_token(tmp_path: Path) -> None:
    model = Path(str(files("mistral_common"))) / "data/mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(model, tmp_path / "tokenizer.model.v3")
    tokenizer = load_tokenizer(tmp_path)
    compiler = GrammarCompiler(tokenizer.vocabulary, tokenizer.eos_ids, tokenizer.vocab_size)
    (marker,) = tokenizer.encode("[TOOL_CALLS]", add_special_tokens=False)
    (turn,) = tokenizer.encode("[INST]", add_special_tokens=False)
    lark = f'start: /(.|\\n)*/ | call\ncall: <[{marker}]> / ?/ %json {{"type": "array", "items": {{"const": 1}}}}'
    special = tokenizer.vocabulary.special
    for opens_text in (False, True):
        matcher = compiler.compile("lark", lark, opens_text=opens_text).matcher()
        assert set(allowed(matcher)) & special == {marker, EOS}
        matcher.accept(marker)
        answer = walk(matcher, tokenizer, random.Random(0), length=8)
        assert set(json.loads(tokenizer.decode(answer))) <= {1}
    with pytest.raises(GrammarError, match="cannot be named"):
        compiler.validate("lark", f"start: <[{turn}]>")


def test_names_that_refer_to_names_thousands_deep_do_no_harm(tiny: GrammarCompiler) -> None:
    """The library recurses; without a stack of its own the process would end here."""
    rules = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(1200)) + 'r1200: "a"'
    terminals = rules.replace("r", "R").replace("staRt", "start")
    links = {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(1900)} | {"1900": {"const": "a"}}
    schema = json.dumps({"$defs": links, "$ref": "#/$defs/0"})
    cases: list[tuple[GrammarKind, str]] = [("lark", rules), ("lark", terminals), ("json_schema", schema)]
    for kind, text in cases:
        matcher = tiny.compile(kind, text).matcher()
        while not matcher.finished:
            matcher.accept(min(allowed(matcher)))


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def patterns(count: int) -> str:
    return json.dumps({"allOf": [{"type": "string", "pattern": f"(.{{{i}}}a)+.*"} for i in range(count)]})


REFUSED: list[tuple[GrammarKind, str, str]] = [
    ("json_schema", '{"description": "' + "x" * 1_000_000 + '"}', "1000019 characters"),
    ("json_schema", nested(40), "too deeply"),
    ("json_schema", nested(1000), "too deeply"),
    ("json_schema", '{"const":' + "[" * 200 + "]" * 200 + "}", "recursion"),
    ("json_schema", "{", "not JSON"),
    ("json_schema", '{"minimum": NaN}', "NaN"),
    ("json_schema", '{"minimum": 1e999}', "too large"),
    ("json_schema", "[]", "an object"),
    ("json_schema", "true", "an object"),
    ("json_schema", '{"anyOf": {}}', "#/anyOf is not a list"),
    ("json_schema", '{"properties": {"a": 3}}', "#/properties/a is neither"),
    ("json_schema", '{"properties": {"a": {"uniqueItems": true}}}', "'uniqueItems' at #/properties/a"),
    ("json_schema", '{"x-guidance": {"lenient": true}}', "'x-guidance'"),
    ("json_schema", '{"type": "strange"}', "strange"),
    ("json_schema", '{"format": "strange", "type": "string"}', "strange"),
    ("json_schema", '{"$ref": "#"}', "nothing matches"),
    ("json_schema", '{"$ref": "https://example.com/schema.json"}', "example.com"),
    ("json_schema", '{"type": "string", "minLength": 3, "maxLength": 2}', "greater than maxLength"),
    ("json_schema", '{"type": "integer", "multipleOf": 100003}', "100003 multiplied"),
    ("json_schema", '{"type": "number", "multipleOf": 1e300}', "multiplied"),
    ("json_schema", '{"type": "number", "multipleOf": 1e999}', "too large"),
    ("json_schema", '{"type": "number", "multipleOf": "2"}', "not a number"),
    ("json_schema", json.dumps({"anyOf": [{"multipleOf": 101}, {"multipleOf": 103}]}), "10403 multiplied"),
    ("json_schema", patterns(64), "64 patterns"),
    ("json_schema", patterns(8), "Unable to determine"),
    ("json_schema", json.dumps({"properties": {f"{i}": {} for i in range(1001)}}), "1001 properties"),
    ("json_schema", json.dumps({"patternProperties": {f"^{i}$": {} for i in range(65)}}), "65 patternProperties"),
    ("json_object", "{}", "0 are allowed"),
    ("choice", "[]", "one or more"),
    ("choice", '["a", 1]', "one or more"),
    ("choice", '"a"', "one or more"),
    ("choice", "a", "not JSON"),
    ("regex", "(a", "unclosed group"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", r"[^\s\S]", "nothing matches"),
    ("regex", "(" * 5000 + "a" + ")" * 5000, "nested parentheses"),
    ("regex", "(.{0,9999}x){0,9999}" * 700, "too many expressions"),
    ("regex", "\ud800", "surrogate"),
    ("regex", r"(é|\w)|\w", "write it in another way"),  # a panic inside the library, no crash
    ("lark", 'first: "a"', "no start rule"),
    ("lark", "start: other", "unknown name"),
    ("lark", "start: start", "nothing matches"),
    ("lark", "start: A\nA: B\nB: A", "circular"),
    ("lark", 'start: <s> "a"', "tokens cannot be named (<s>)"),
    ("lark", 'start: <[1]> "a"', "tokens cannot be named"),
    ("lark", 'start: "a" @answer', "@answer"),
    ("lark", 'start: a "b"\na[stop="b"]: /a*/', "stop="),
    ("lark", 'start: a "b"\na[temperature=0.5]: /a*/', "temperature="),
    ("lark", '%llguidance {"allow_invalid_utf8": true}\nstart: "a"', "options"),
    ("lark", 'start: %json {"not": {}}', "'not' at #"),
    ("lark", "start: %json nothing", "not followed by"),
    ("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
    ("lark", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "a"', "too big"),
    ("lark", "start: " + " | ".join(f'"{i}"{{0,99999}}' for i in range(900)), "too big"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), REFUSED, ids=[f"{k}-{t[:24]!a}" for k, t, _ in REFUSED])
def test_what_cannot_be_honoured_is_refused_in_one_sentence(
    kind: GrammarKind, text: str, reason: str, tiny: GrammarCompiler
) -> None:
    with pytest.raises(GrammarError, match=re.escape(reason)) as raised:
        tiny.validate(kind, text)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 400


def test_lark_texts_may_say_what_its_syntax_may_not(tiny: GrammarCompiler) -> None:
    """Strings, regexes and comments that look like the refused parts are what they are."""
    tiny.validate("lark", '%llguidance {}\nstart: "<s>" /<b>@x/ "stop=" // <s> %json {"not": 1}\n# @answer\n')
