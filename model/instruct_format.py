"""Mistral's instruct format, for checkpoints that bring a tokenizer and no chat template.

    v1 (8x7B)    <s> "[INST] hi [/INST]"  "hello" </s>  "[INST] bye [/INST]"
    v3 (8x22B)   <s> [INST] "hi" [/INST]  "hello" </s>  [INST] "bye" [/INST]

Each quoted text is encoded on its own, so each begins with SentencePiece's space; the rest are control tokens.
The system prompt opens the first user message in v1 and the last one in v3. Knows nothing of token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from model.errors import TokenizerError

Part = Literal["bos", "eos", "[INST]", "[/INST]"]


@dataclass(frozen=True, slots=True)
class Text:
    """A stretch encoded on its own, in which no control token is looked for."""

    text: str


def mistral_instruct(messages: Sequence[Mapping[str, Any]], *, control_tokens: bool) -> list[Part | Text]:
    """v3 where the vocabulary has [INST] as a control token, else v1. Neighbours of one role become one message."""
    system = _joined(message for message in messages if _role(message) == "system")
    turns = [(role, _joined(group)) for role, group in groupby(messages, key=_role) if role != "system"]
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", ""))
    users = [i for i, (role, _) in enumerate(turns) if role == "user"]
    opened = users[-1] if control_tokens else users[0]
    parts: list[Part | Text] = ["bos"]
    for i, (role, text) in enumerate(turns):
        if role == "assistant":
            parts += [Text(text.rstrip(" ") if control_tokens else text), "eos"]
            continue
        if system and i == opened:
            text = f"{system}\n\n{text}"
        parts += ["[INST]", Text(text), "[/INST]"] if control_tokens else [Text(f"[INST] {text} [/INST]")]
    return parts


def _role(message: Mapping[str, Any]) -> str:
    match message.get("role"):
        case str(role) if role in ("system", "user", "assistant"):
            return role
        case role:
            raise TokenizerError(
                f"this model has no chat template, and Mistral's plain format knows the roles system, user and "
                f"assistant, not {role!r}: add chat_template.jinja to the checkpoint"
            )


def _joined(messages: Iterable[Mapping[str, Any]]) -> str:
    texts = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str):
            raise TokenizerError(f"the content of a message must be text, not {type(content).__name__}")
        texts.append(content)
    return "\n\n".join(texts)
