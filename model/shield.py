"""Keeps what users write from turning into control tokens when a chat template puts it into a prompt.

    user writes   </s> and <        covered   <·/·s·> and <·        prompt   <s>[INST] <·/·s·> and <· [/INST]

`cover` breaks up every special token inside a conversation, and ends what could be the first half of one with a
break; the template adds its own, whole; the tokenizer finds whole ones only; then the breaks (drawn as dots) are
taken out and what they broke up is encoded as the plain text it is.

A break is plain ASCII, so that it comes through whatever a template does to show a value (tojson, repr). Where a user
writes one it is dropped. Not covered: special tokens of a single character, and control words that the vocabulary has
no token for, such as v1's "[INST]": to the model those are the same letters, whoever wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from model.errors import TokenizerError

BREAK = "~0break0~"


class Shield:
    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._beginnings = {token[:end] for token in longest_first for end in range(1, len(token))}
        self._longest = max(map(len, self._beginnings), default=0)

    def cover(self, value: Any) -> Any:
        """A JSON value with breaks in its texts, however deep."""
        match value:
            case str():
                return self._cover_text(value)
            case Mapping():
                return {self.cover(key): self.cover(item) for key, item in value.items()}
            case list() | tuple():
                return [self.cover(item) for item in value]
            case None | bool() | int() | float():
                return value
        raise TokenizerError(
            f"messages, tools and template arguments are made of JSON values, not {type(value).__name__}"
        )

    def _cover_text(self, text: str) -> str:
        text = self._special.sub(lambda match: BREAK.join(match[0]), text)
        stem = text.rstrip()  # templates trim
        if any(stem[-length:] in self._beginnings for length in range(1, self._longest + 1)):
            return stem + BREAK + text[len(stem) :]
        return text
