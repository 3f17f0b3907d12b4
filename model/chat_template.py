"""A conversation to one prompt text, by the checkpoint's own Jinja template.

A template is a program that came with the weights: it runs in Jinja's sandbox, without a loader, on plain JSON values.
Three bounds keep it from holding the server, whatever the conversation makes it do:

    time     CPU seconds of this thread, looked at in every turn of a loop and every call; Jinja bounds range() itself
    memory   characters or elements in anything it joins, adds or multiplies, and in what it writes
    depth    Python's recursion limit, for macros

Between two looks only single operations on bounded values run. One filter call that asks for a huge width (center,
indent) is not looked into: a template's author could as well have shipped wrong weights.

Knows nothing of token ids.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from model.errors import TokenizerError

MAX_SECONDS = 2.0
MAX_CHARACTERS = 16 * 1024 * 1024

_BUDGET = "budget of this rendering"  # a variable that no template can spell
_LOOPED = "looped"
_JOINED = "joined"


class ChatTemplate:
    """A compiled template. Compiling fails at load, rendering with the template's own message."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        *,
        max_seconds: float = MAX_SECONDS,
        max_characters: int = MAX_CHARACTERS,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._variables = dict(variables)  # bos_token, eos_token, ...
        self._max_seconds = max_seconds
        self._clock = clock
        environment = _BoundedEnvironment(max_characters)
        try:
            tree = _Bounds().visit(environment.parse(source))
            code = environment.compile(tree)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template does not compile: {error}") from error
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        **arguments: Any,
    ) -> str:
        """The prompt as text. Values are JSON's own types; `arguments` may replace bos_token and its like."""
        values = {"documents": None, **self._variables, **arguments}
        values |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        values[_BUDGET] = _Budget(self._clock, self._clock() + self._max_seconds)
        try:
            return self._template.render(values)
        except _FAILURES as error:
            raise TokenizerError(f"the chat template refused the conversation: {error}") from error


# What a program on JSON values can raise: its own raise_exception, or a value that is not what it expected.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class _Budget:
    clock: Callable[[], float]
    deadline: float

    def check(self) -> None:
        if self.clock() > self.deadline:
            raise jinja2.TemplateRuntimeError("it takes too long; send fewer or shorter messages")


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, max_characters: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._max_characters = max_characters
        self.filters["tojson"] = _tojson
        self.filters[_LOOPED] = _looped
        self.filters[_JOINED] = lambda parts: self.concat(map(str, parts))
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def concat(self, parts: Iterable[str]) -> str:
        """Joins what the template, a macro or a block wrote."""
        kept: list[str] = []
        left = self._max_characters
        for part in parts:
            left -= len(part)
            self._check_size(left)
            kept.append(part)
        return "".join(kept)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _check_budget(__context)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "+" if isinstance(left, Sized) and isinstance(right, Sized):
                self._check_size(self._max_characters - len(left) - len(right))
            case "*" if isinstance(left, Sized) or isinstance(right, Sized):
                sequence, times = (left, right) if isinstance(left, Sized) else (right, left)
                self._check_size(self._max_characters - len(sequence) * times)
            case "**" | "*" if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                self._check_size(self._max_characters - bits)
        return super().call_binop(context, operator, left, right)

    def _check_size(self, left: int) -> None:
        if left < 0:
            raise jinja2.TemplateRuntimeError(
                f"it makes a text of more than {self._max_characters} characters; send fewer or shorter messages"
            )


class _Bounds(NodeTransformer):
    """Puts the look at the clock into every loop, and the look at the length into every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _LOOPED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr), node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _check_budget(context: Context) -> None:
    budget = context.parent[_BUDGET]
    assert isinstance(budget, _Budget)
    budget.check()


@pass_context
def _looped(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_budget(context)
        yield item


class _GenerationTag(Extension):
    """{% generation %} marks what the assistant says, for training; here its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which a model should not read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
