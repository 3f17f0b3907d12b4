from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from cluster.answer_text import AnswerText


class Letters:
    """A decoder whose token ids are characters."""

    def push(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def flush(self) -> str:
        return ""


def show(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    text = AnswerText(Letters(), stop)  # type: ignore[arg-type]
    shown = ""
    for piece in pieces:
        more, stopped = text.push([ord(c) for c in piece])
        shown += more
        if stopped:
            return shown, stopped
    more, stopped = text.flush()
    return shown + more, stopped


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    assert show(["th", "e E", "N", "D."], ["END"]) == ("the ", "END")
    assert show(["th", "e E", "N", "o"], ["END"]) == ("the ENo", None)


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    text = AnswerText(Letters(), ["END"])  # type: ignore[arg-type]
    assert text.push([ord("x"), ord("E")]) == ("x", None)
    assert text.push([ord("E")]) == ("E", None)
    assert text.flush() == ("E", None)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_any_split_shows_what_the_whole_text_shows(text: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [text.find(s) + len(s) for s in stop if s in text]
    shown, stopped = show(pieces, stop)
    assert bool(stopped) == bool(ends)
    assert text.startswith(shown)
    if not stopped:
        assert shown == text
    else:
        assert not any(s in shown for s in stop)
        assert text.startswith(shown + stopped)


def test_a_stop_string_may_be_part_of_the_answer() -> None:
    text = AnswerText(Letters(), ["END", "E"], include_stop=True)  # type: ignore[arg-type]
    assert text.push([ord(c) for c in "the END"]) == ("the E", "E")
