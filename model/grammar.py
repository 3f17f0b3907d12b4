"""Answers that must match a grammar: what may come next at each token, for a JSON schema, a regex, choices or Lark.

    GrammarCompiler ── kind, text ──▶ CompiledGrammar ── one per sequence ──▶ Matcher ── accept(token) ──▶ ...
                                                                                 └── apply_grammars(logits)

The work is llguidance's: an Earley parser over lazily built automata, which walks the vocabulary as a tree of bytes.
Nothing here looks at a clock: what a text may cost is bounded in sizes and in the library's own steps, so HTTP and
every rank decide alike, on any machine and at any load, and a replay never fails where the first run did not.

Tokens are bytes here. A token without text (control tokens, ids that only the model's padded vocabulary has) is never
allowed, but for a marker that a Lark grammar names; an end of sequence is allowed exactly where the grammar may end.

R rows, V vocabulary of the logits, B bytes of a row's mask, K values of a byte.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from model.detokenizer import Vocabulary
from model.errors import GrammarError
from model.grammar_text import GrammarKind, library_grammar
from model.to_device import numbers, to_device

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Result = TypeVar("Result")

# Half of the library's own or less: the worst texts we found take half a second to compile and some tens of
# milliseconds to mask; what people write takes a few milliseconds, and ten microseconds.
_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
}
# The library recurses as deep as names refer to each other: 3,000 deep, an ordinary stack of 8 MB ends the process.
_STACK_BYTES = 256 << 20
_MARKERS = {b"[TOOL_CALLS]"}  # control tokens that begin a part of an answer
_LONGEST_REASON = 200


@dataclass(frozen=True, slots=True)
class InAnswers:
    """Which ids may be in an answer at all. One bit for each id, the lowest first, as in a mask."""

    all: int  # tokens with text, ends of sequence, markers
    spaced: int  # of these, the ones whose text begins with a space
    num_bytes: int  # of a mask

    @classmethod
    def of(cls, texts: Sequence[bytes], other_ids: Collection[int]) -> InAnswers:
        everything = sum(1 << i for i, text in enumerate(texts) if text or i in other_ids)
        spaced = sum(1 << i for i, text in enumerate(texts) if text.startswith(b" "))
        return cls(everything, spaced, (len(texts) + 31) // 32 * 4)


class GrammarCompiler:
    """Grammars for one vocabulary, the latest ones kept. Safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int], vocab_size: int, max_cached: int = 64) -> None:
        """vocab_size is the logits', which may be padded beyond the tokenizer's vocabulary."""
        eos = frozenset(i for i in eos_ids if i < vocab_size)
        special = [i for i in vocabulary.special if 0 <= i < vocab_size]
        self._markers = frozenset(i for i in special if vocabulary.token_bytes[i] in _MARKERS)
        self._eos = eos
        self._texts = _token_texts(vocabulary, eos, vocab_size)
        self._in_answers = InAnswers.of(self._texts, eos | self._markers)
        self._max_cached = max_cached
        self._compiled: OrderedDict[tuple[GrammarKind, str, bool], CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()

    def compile(self, kind: GrammarKind, text: str, *, opens_text: bool = False) -> CompiledGrammar:
        """A grammar of the whole answer, ready for use, or GrammarError.

        opens_text: the answer is a message, not a text that goes on from the prompt's. Its first word's leading space
        is then no part of it (detokenizer.py), so it is allowed in front of what matches.
        """
        key = (kind, text, opens_text)
        if (known := self._cached(key)) is not None:
            return known
        with self._compiling:  # one at a time, so that many do not take every core
            compiled = self._cached(key) or _on_deep_stack(lambda: self._compile(*key))
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > self._max_cached:
                self._compiled.popitem(last=False)
        return compiled

    def validate(self, kind: GrammarKind, text: str) -> None:
        """GrammarError where compile() would raise it. May take half a second: not for an event loop."""
        self.compile(kind, text)

    def _cached(self, key: tuple[GrammarKind, str, bool]) -> CompiledGrammar | None:
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
            return self._compiled.get(key)

    def _compile(self, kind: GrammarKind, text: str, with_space: bool) -> CompiledGrammar:
        if not self._eos:
            raise GrammarError("this model has no end of sequence, so an answer cannot end where its grammar does")
        answer = library_grammar(kind, text, self._markers)
        spaced = self._build(kind, 'start: " " @answer', answer) if with_space else None
        return CompiledGrammar(Matcher(self._build(kind, "start: @answer", answer), self._in_answers, spaced))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made for the first grammar, under its lock: whoever is asked for none does without the library."""
        return _library_tokenizer(self._texts, self._eos)

    def _build(self, kind: GrammarKind, start: str, answer: Mapping[str, object]) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        # Unless told so, the library forces text as the tokens that it would write, not those the model would.
        top = {"lark_grammar": f'%llguidance {{"no_forcing": true}}\n{start}'}
        try:
            grammar = json.dumps({"grammars": [top, {"name": "answer", **answer}]}, allow_nan=False)
        except (ValueError, RecursionError):
            raise GrammarError(f"the {kind} has a number that is too large or a value nested too deeply") from None
        limits = LLParserLimits(**_LIMITS, precompute_large_lexemes=False, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what cannot begin is refused here
        if matcher.is_error():
            raise GrammarError(f"the {kind} cannot be used: {_reason(matcher)}")
        return matcher


class CompiledGrammar:
    """Immutable: every sequence gets a matcher of its own."""

    def __init__(self, beginning: Matcher) -> None:
        self._beginning = beginning
        self._lock = threading.Lock()  # the library refuses two callers at once

    def matcher(self) -> Matcher:
        with self._lock:
            return self._beginning.copy()


class Matcher:
    """Where one sequence's answer is in its grammar. Once it has raised, it only raises."""

    def __init__(self, library: LLMatcher, in_answers: InAnswers, spaced: LLMatcher | None = None) -> None:
        """spaced: the same grammar behind a space. The first token decides: one that begins with a space goes there."""
        self._library = library
        self._in_answers = in_answers
        self._spaced = spaced

    def copy(self) -> Matcher:
        spaced = None if self._spaced is None else self._spaced.deep_copy()
        return Matcher(self._library.deep_copy(), self._in_answers, spaced)

    @property
    def finished(self) -> bool:
        """Nothing but an end of sequence may follow."""
        return self._spaced is None and self._library.is_stopped() and not self._library.is_error()

    def accept(self, token_id: int) -> None:
        """The answer's next token."""
        if not self._in_answers.all >> token_id & 1:  # the library would take it for an empty text
            raise GrammarError(f"token {token_id} cannot be in an answer with a grammar: it has no text")
        if self._spaced is not None and self._in_answers.spaced >> token_id & 1:
            self._library = self._spaced
        self._spaced = None
        if not self._library.consume_token(token_id):
            raise GrammarError(f"token {token_id} cannot come next: {_reason(self._library)}")

    def replay(self, token_ids: Sequence[int]) -> None:
        """What was generated before a preemption or a recovery."""
        for token_id in token_ids:
            self.accept(token_id)

    def mask(self) -> bytes:
        """One bit for each id, the lowest first: may it come next?"""
        mask = _mask(self._library)
        if self._spaced is not None:
            mask = (mask & ~self._in_answers.spaced) | (_mask(self._spaced) & self._in_answers.spaced)
        return (mask & self._in_answers.all).to_bytes(self._in_answers.num_bytes, "little")


def apply_grammars(logits_RV: Tensor, matchers: Mapping[int, Matcher]) -> dict[int, GrammarError]:
    """Set to -inf, in place, what each matcher's row forbids. Rows that cannot go on come back with their reason.

    Bans and biases come before (logit_rules.py). A row that they leave no allowed token has nothing but -inf then,
    which is not asked here: whoever knows what was chosen asks what logit it had, and nobody waits for a device twice.
    """
    masks: dict[int, bytes] = {}
    failed: dict[int, GrammarError] = {}
    for row, matcher in matchers.items():
        try:
            masks[row] = matcher.mask()
        except GrammarError as error:
            failed[row] = error
    if not masks:
        return failed
    rows = numbers(list(masks), torch.int64, logits_RV.device)
    bytes_RB = torch.frombuffer(bytearray(b"".join(masks.values())), dtype=torch.uint8).view(len(masks), -1)
    logits_RV.index_add_(0, rows, _biases(to_device(bytes_RB, logits_RV.device), logits_RV))
    return failed


def _biases(bytes_RB: Tensor, like_RV: Tensor) -> Tensor:
    """0 for a bit that is set, -inf for one that is not. Adding rows of a table takes a tenth of masked_fill's time."""
    value_K1 = torch.arange(256, device=like_RV.device)[:, None]
    is_set_K8 = value_K1 >> torch.arange(8, device=like_RV.device) & 1 == 1
    bias_K8 = torch.where(is_set_K8, 0.0, -torch.inf).to(like_RV.dtype)
    bias_RV = bias_K8.index_select(0, bytes_RB.flatten().int()).view(bytes_RB.shape[0], -1)
    return bias_RV[:, : like_RV.shape[1]]


def _token_texts(vocabulary: Vocabulary, eos_ids: frozenset[int], vocab_size: int) -> tuple[bytes, ...]:
    """What each id adds to an answer; nothing, of ids that may not be in one. No UTF-8 text has a byte 0xFF."""

    def text(i: int) -> bytes:
        if i >= len(vocabulary) or i in vocabulary.special or i in eos_ids or b"\xff" in vocabulary.token_bytes[i]:
            return b""
        return vocabulary.token_bytes[i]

    return tuple(map(text, range(vocab_size)))


@dataclass(frozen=True)
class _Tokens:
    """What the library asks of a tokenizer. It encodes nothing, since no text is forced."""

    tokens: Sequence[bytes]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        return []


def _library_tokenizer(texts: Sequence[bytes], eos_ids: frozenset[int]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Tokens(texts, min(eos_ids))), eos_token=sorted(eos_ids))


def _on_deep_stack(work: Callable[[], Result]) -> Result:
    """Runs work in a thread whose stack is large, whoever asks."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised again by result()
            future.set_exception(error)

    before = threading.stack_size(_STACK_BYTES)
    try:
        threading.Thread(target=run, name="grammar-compile").start()
    finally:
        threading.stack_size(before)
    return future.result()


def _mask(library: LLMatcher) -> int:
    mask = library.compute_bitmask()
    if library.is_error():
        raise GrammarError(_reason(library))
    return int.from_bytes(mask, "little")


def _reason(matcher: LLMatcher) -> str:
    """The library's message in one line, without its own trace."""
    message = matcher.get_error()
    if message.startswith("NoExtension"):
        return "nothing matches it"
    if message.startswith("panic"):
        return "the grammar library fails on it; write it in another way"
    lines = message.splitlines()
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    return reason.removeprefix("error: ")[:_LONGEST_REASON]
