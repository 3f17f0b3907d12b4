"""One question with its answer, and what may be asked next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "fact", "comparison", "chat", "unknown", "sum", "story", "name", "repeat", "visitor", "follow-up", "completion"
]


@dataclass(frozen=True, slots=True)
class Turn:
    kind: Kind
    question: str
    answer: str
    why: str = ""  # the answer to "why?" (empty: nobody asks)
    more: str = ""  # the answer to "tell me more" (empty: nobody asks)
    about: tuple[tuple[str, str], ...] = ()  # questions about the answer itself, such as a name in a story
