"""Token ids to text, whole or as they come, from one table of what each id adds.

    ids        1     22557   28725   231  191  163     28723     2
    adds      (<s>)  ▁Hello    ,    <E4> <BD> <A0>       .     (</s>)
    pushes     ""    "Hello"  ","    ""   ""  "你"      "."      ""

A text is the bytes of its tokens in a row, read as UTF-8, without the one space that SentencePiece puts before the
first word. Knows no tokenizer library: whoever loads one fills in a `Vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LONGEST_UNFINISHED = 3  # bytes of a character that lacks its last


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each id adds to a text."""

    token_bytes: tuple[bytes, ...]  # by id; of a control token, its name
    special: frozenset[int]  # control tokens: skip_special_tokens leaves them out
    strips_leading_space: bool  # the first word of a text carries a space that is not part of it
    replaces_each_byte: bool  # U+FFFD for every invalid byte (byte-fallback) or for each broken character (byte-level)

    def __len__(self) -> int:
        return len(self.token_bytes)

    def bytes_of(self, ids: Iterable[int], skip_special_tokens: bool) -> bytes:
        """Ids that the tokenizer does not have add nothing: models pad their vocabulary, and may sample the padding."""
        size = len(self.token_bytes)
        hidden = self.special if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes[i] for i in ids if 0 <= i < size and i not in hidden)


class IncrementalDecoder:
    """The text of a growing sequence of ids, handed out in whole characters.

    All pushes and the flush together are `decode` of all the ids together; with a prompt, they are what `decode` of
    prompt and ids has over `decode` of the prompt: a word's leading space stays ("The capital is" + " Paris"), and a
    character that the prompt began is handed out once the ids complete it.

    Holds at most three bytes back, whatever came before.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        opens_message: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
        # No byte of the text seen yet, and a space there is not part of it.
        self._at_start = opens_message or vocabulary.strips_leading_space
        self._pending = b""
        self._read_prompt(prompt_ids)

    def push(self, ids: Sequence[int]) -> str:
        """The characters that these ids complete."""
        return self._decode(self._vocabulary.bytes_of(ids, self._skip_special_tokens), final=False)

    def flush(self) -> str:
        """What is held back, as U+FFFD: nothing follows that could complete it."""
        return self._decode(b"", final=True)

    def _decode(self, new: bytes, final: bool) -> str:
        if self._at_start and new:
            self._at_start = False
            new = new.removeprefix(b" ")
        text, self._pending = decode_utf8(self._pending + new, self._vocabulary.replaces_each_byte, final)
        return text

    def _read_prompt(self, prompt_ids: Sequence[int]) -> None:
        tail = b""  # enough of the prompt's end to hold an unfinished character
        for i in reversed(prompt_ids):
            tail = self._vocabulary.bytes_of((i,), self._skip_special_tokens) + tail
            if len(tail) >= _LONGEST_UNFINISHED:
                break
        if tail:
            self._at_start = False
            _, self._pending = decode_utf8(tail, self._vocabulary.replaces_each_byte, final=False)


def decode_utf8(data: bytes, replaces_each_byte: bool, final: bool) -> tuple[str, bytes]:
    """The text of `data` with U+FFFD for what is no UTF-8, and, unless final, the unfinished character at its end."""
    parts: list[str] = []
    while True:
        try:
            parts.append(data.decode())
            return "".join(parts), b""
        except UnicodeDecodeError as error:
            parts.append(data[: error.start].decode())
            if error.end == len(data) and error.reason == "unexpected end of data" and not final:
                return "".join(parts), data[error.start :]
            parts.append("\ufffd" * (error.end - error.start if replaces_each_byte else 1))
            data = data[error.end :]
