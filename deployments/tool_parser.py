"""Tool calls out of a model's text, as it comes, in Mistral's format:

    Let me see. [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, ...]
    ╰─content─╯              │ ╰────────name─────╯ ╰──arguments, piece by piece─╯
    outside ─────────────────▶ list ─▶ call ─▶ list ─▶ call ─▶ list ─▶ closed ─▶ text

Names and arguments may come in either order, and other keys (id) are passed over. Arguments go out as the model
wrote them. What is not in this format goes out as content, so that nothing a model says is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.tools import MARKER, new_call_id

Json = dict[str, Any]
_SPACE = " \t\r\n"


@dataclass(slots=True)
class Pieces:
    """What a push gave: text for the reader, and OpenAI's deltas of tool calls."""

    content: str = ""
    calls: list[Json] = field(default_factory=list)


class ToolCallParser:
    def __init__(
        self, *, in_calls: bool = False, max_calls: int | None = None, call_id: Callable[[], str] = new_call_id
    ) -> None:
        """in_calls: the prompt ended with the marker already. Calls beyond max_calls are dropped."""
        self._where: Literal["outside", "list", "call", "closed", "text"] = "list" if in_calls else "outside"
        self._max_calls = max_calls
        self._call_id = call_id
        self._text = ""  # not yet decided on
        self._call = _Call()
        self._calls = 0
        self._opened = False  # the list's bracket was seen

    @property
    def num_calls(self) -> int:
        """That have begun and count."""
        return self._calls if self._max_calls is None else min(self._calls, self._max_calls)

    @property
    def _is_dropped(self) -> bool:
        return self._max_calls is not None and self._calls > self._max_calls

    def push(self, text: str, *, last: bool = False) -> Pieces:
        self._text += text
        pieces = Pieces()
        while self._advance(pieces, last):
            pass
        if last and self._where == "call":
            self._give_up(pieces)
        return pieces

    def _advance(self, pieces: Pieces, last: bool) -> bool:
        """Decide on a bit of text; False: nothing more can be decided until more comes."""
        match self._where:
            case "outside":
                return self._find_marker(pieces, last)
            case "list":
                return self._find_call()
            case "call":
                return self._read_call(pieces)
            case "closed":
                self._text = self._text.lstrip(_SPACE)
                self._where = "text" if self._text else "closed"
                return self._where == "text"
            case "text":
                pieces.content += self._text
                self._text = ""
                return False

    def _find_marker(self, pieces: Pieces, last: bool) -> bool:
        before, marker, after = self._text.partition(MARKER)
        if marker:
            pieces.content += before.rstrip(_SPACE)
            self._where, self._text = "list", after
            return True
        held = 0 if last else _undecided(self._text)
        pieces.content += self._text[: len(self._text) - held]
        self._text = self._text[len(self._text) - held :]
        return False

    def _find_call(self) -> bool:
        text = self._text.lstrip(_SPACE)
        if not text:
            return False
        first, rest = text[0], text[1:]
        if first == "[" and not self._opened:
            self._opened, self._text = True, rest
        elif first == "{" and self._opened:
            self._where, self._text = "call", rest
            self._calls += 1
            self._call = _Call(dropped=self._is_dropped)
        elif first == "," and self._calls:
            self._text = rest
        elif first == "]" and self._opened:
            self._where, self._text = "closed", rest
        else:  # not a list of calls after all
            self._where = "text"
        return True

    def _read_call(self, pieces: Pieces) -> bool:
        if not self._text:
            return False
        used, state = self._call.read(self._text)
        self._text = self._text[used:]
        if not self._is_dropped:
            pieces.calls += self._call.deltas(self._calls - 1, self._call_id, ended=state == "ended")
        if state == "broken" or (state == "ended" and not self._call.announced):
            self._give_up(pieces)
        elif state == "ended":
            self._where = "list"
        return True

    def _give_up(self, pieces: Pieces) -> None:
        """This is no call: whoever reads shall see it, unless a part of it has gone out as one."""
        self._where = "text"
        if not self._call.announced:
            pieces.content += self._call.seen
            self._calls -= 1


class _Call:
    """One call's object, behind its brace. Follows strings and depth, character by character; parses keys and name."""

    def __init__(self, *, dropped: bool = False) -> None:
        self.seen = "{"  # until it is announced
        self.announced = dropped  # to the reader; a dropped one needs no announcement
        self._depth = 0  # of brackets within the object
        self._in_string = self._escaped = False
        self._token = ""  # the text of the key or value being read, but not of arguments
        self._key: str | None = None  # None: a key comes next
        self._name: str | None = None
        self._arguments = ""  # not yet handed out
        self._has_arguments = False

    def read(self, text: str) -> tuple[int, Literal["open", "ended", "broken"]]:
        """How much of the text belongs to the object, and what has become of it."""
        used, state = self._scan(text)
        if not self.announced:
            self.seen += text[:used]
        return used, state

    def deltas(self, index: int, call_id: Callable[[], str], *, ended: bool) -> list[Json]:
        """What became known since the last time."""
        if self._name is None:
            return []
        deltas: list[Json] = []
        if not self.announced:
            self.announced = True
            function = {"name": self._name, "arguments": ""}
            deltas.append({"index": index, "id": call_id(), "type": "function", "function": function})
        arguments, self._arguments = self._arguments, ""
        if ended and not self._has_arguments:
            arguments = "{}"
        if arguments:
            deltas.append({"index": index, "function": {"arguments": arguments}})
        return deltas

    def _scan(self, text: str) -> tuple[int, Literal["open", "ended", "broken"]]:
        for position, character in enumerate(text):
            if self._in_string:
                self._keep(character)
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif self._depth == 0 and character in ":,}":
                if not self._separate(character):
                    return position + 1, "broken"
                if character == "}":
                    return position + 1, "ended"
            elif self._depth == 0 and character == "]":
                return position, "broken"
            else:
                self._in_string = character == '"'
                self._depth += (character in "{[") - (character in "}]")
                if self._in_string or self._depth or character not in _SPACE:  # space around a value is not part of it
                    self._keep(character)
        return len(text), "open"

    def _keep(self, character: str) -> None:
        if self._key == "arguments":
            self._arguments += character
            self._has_arguments = True
        else:
            self._token += character

    def _separate(self, character: str) -> bool:
        """A key, a pair or the object is complete; False: it makes no sense."""
        token, self._token = self._token, ""
        if character == ":":
            self._key = _string(token) if self._key is None else None
            return self._key is not None
        if self._key == "name":
            self._name = _string(token)
        complete = self._key is not None or (character == "}" and not token)
        known = self._key != "name" or self._name is not None
        self._key = None
        return complete and known


def _string(token: str) -> str | None:
    try:
        value = json.loads(token)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _undecided(text: str) -> int:
    """Length of the text's end that may be the beginning of a marker, with the space before it."""
    longest = next((n for n in range(min(len(text), len(MARKER) - 1), 0, -1) if MARKER.startswith(text[-n:])), 0)
    before = text[: len(text) - longest]
    return longest + len(before) - len(before.rstrip(_SPACE))
