"""From token ids to the text a caller may see: whole characters, and nothing of a stop string.

Text that might be the beginning of a stop string is held back until the next token decides:

    stop "END"    tokens  "th" "e E" "N" "D"    goes out  "th" "e " "" ""  and the answer ends
                          "th" "e E" "N" "o"              "th" "e " "" "ENo"
"""

from __future__ import annotations

from collections.abc import Sequence

from model.detokenizer import IncrementalDecoder


class AnswerText:
    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._decoder = decoder
        self._stop = [text for text in stop if text]
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """The text to show now, and the stop string that ended the answer."""
        return self._show(self._decoder.push(token_ids), last=False)

    def flush(self) -> tuple[str, str | None]:
        """The rest, when no token follows."""
        return self._show(self._decoder.flush(), last=True)

    def _show(self, text: str, *, last: bool) -> tuple[str, str | None]:
        if not self._stop:
            return text, None
        held = self._held + text
        found = min(((at, stop) for stop in self._stop if (at := held.find(stop)) >= 0), default=None)
        if found is not None:
            at, stop = found
            self._held = ""
            return held[: at + len(stop) * self._include_stop], stop
        keep = 0 if last else max(_overlap(held, stop) for stop in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
