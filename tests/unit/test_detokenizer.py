"""Streamed text = whole text, for any ids however they are cut; and the whole text is what SentencePiece decodes."""

from __future__ import annotations

import random
from importlib.resources import files

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from model.detokenizer import IncrementalDecoder, Vocabulary, decode_utf8

WORDS = [
    b"<s>",
    b"</s>",
    b"",
    b" Hello",
    b" ",
    b"  ",
    b"lo",
    "你好".encode(),
    "👩‍👩‍👧".encode(),
    "é".encode(),
    "\ufffd".encode(),
]
BYTES = [bytes([byte]) for byte in range(256)]
TABLE = (*WORDS, *BYTES)
SPECIAL = frozenset({0, 1})

vocabularies = st.builds(Vocabulary, st.just(TABLE), st.just(SPECIAL), st.booleans(), st.booleans())
# Half of the ids spell whole characters byte by byte, so that valid text is as common as broken text.
spelled = st.text(max_size=3).map(lambda text: [len(WORDS) + byte for byte in text.encode()])
pieces = st.one_of(st.integers(-1, len(TABLE)).map(lambda i: [i]), spelled)
ids_lists = st.lists(pieces, max_size=12).map(lambda lists: [i for ids in lists for i in ids])


def whole_text(vocabulary: Vocabulary, ids: list[int], skip: bool) -> str:
    """The definition, slowly: join all bytes, drop the first word's space, read one character after another."""
    known = [i for i in ids if 0 <= i < len(TABLE) and not (skip and i in SPECIAL)]
    data = b"".join(TABLE[i] for i in known)
    if vocabulary.strips_leading_space and data[:1] == b" ":
        data = data[1:]
    if not vocabulary.replaces_each_byte:
        return data.decode(errors="replace")
    text = ""
    while data:
        for length in range(1, 5):
            try:
                character = data[:length].decode()
            except UnicodeDecodeError:
                continue
            break
        else:
            character, length = "\ufffd", 1
        text, data = text + character, data[length:]
    return text


@given(vocabularies, ids_lists, st.booleans(), st.randoms(use_true_random=False))
def test_pushes_and_flush_are_the_whole_text(
    vocabulary: Vocabulary, ids: list[int], skip: bool, rng: random.Random
) -> None:
    whole = whole_text(vocabulary, ids, skip)
    decoder = IncrementalDecoder(vocabulary, skip_special_tokens=skip)
    text = ""
    left = ids
    while left:
        count = rng.randint(1, len(left))
        text += decoder.push(left[:count])
        left = left[count:]
        assert whole.startswith(text)  # never half a character, never a word to take back
    assert text + decoder.flush() == whole


@given(vocabularies, ids_lists, ids_lists, st.booleans())
def test_a_continuation_is_what_the_whole_text_has_over_its_prompt(
    vocabulary: Vocabulary, prompt_ids: list[int], ids: list[int], skip: bool
) -> None:
    whole_characters = IncrementalDecoder(vocabulary, skip_special_tokens=skip).push(prompt_ids)
    decoder = IncrementalDecoder(vocabulary, prompt_ids, skip)
    continuation = decoder.push(ids) + decoder.flush()
    assert whole_characters + continuation == whole_text(vocabulary, prompt_ids + ids, skip)


@given(vocabularies, st.text())
def test_a_character_is_handed_out_with_its_last_byte(vocabulary: Vocabulary, text: str) -> None:
    decoder = IncrementalDecoder(vocabulary, prompt_ids=[WORDS.index(b"lo")])
    for character in text:
        *first, last = (len(WORDS) + byte for byte in character.encode())
        assert decoder.push(first) == ""
        assert decoder.push([last]) == character
    assert decoder.flush() == ""


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_began(cut: int) -> None:
    vocabulary = Vocabulary(TABLE, SPECIAL, strips_leading_space=True, replaces_each_byte=True)
    ids = [len(WORDS) + byte for byte in "😀".encode()]
    decoder = IncrementalDecoder(vocabulary, [3, *ids[:cut]])
    assert decoder.push(ids[cut:]) == "😀"


def test_the_words_of_a_chat_and_of_a_completion() -> None:
    vocabulary = Vocabulary((b"<s>", b" The", b" capital"), frozenset({0}), True, True)
    assert IncrementalDecoder(vocabulary).push([1, 2]) == "The capital"
    assert IncrementalDecoder(vocabulary, [0]).push([1, 2]) == "The capital"
    assert IncrementalDecoder(vocabulary, [0, 1]).push([2]) == " capital"
    assert IncrementalDecoder(vocabulary, [0, 1], skip_special_tokens=False).push([2, 0]) == " capital<s>"
    assert IncrementalDecoder(vocabulary, skip_special_tokens=False).push([0, 1]) == "<s> The"


@pytest.mark.parametrize("by_the_tokenizer", [True, False])
def test_a_message_begins_without_the_one_space_before_it(by_the_tokenizer: bool) -> None:
    """Whether the tokenizer put it there, or the template that the model learnt from."""
    vocabulary = Vocabulary((b"<s>", b" The", b" ", b"\xe4"), frozenset({0}), by_the_tokenizer, True)

    def shown(*ids: int, skip_special_tokens: bool = True) -> str:
        decoder = IncrementalDecoder(vocabulary, (), skip_special_tokens, opens_message=True)
        return "".join(decoder.push([i]) for i in ids) + decoder.flush()

    assert shown(1, 1) == "The The"
    assert shown(2, 1) == " The"
    assert shown(0, 1) == "The"
    assert shown(0, 1, skip_special_tokens=False) == "<s> The"
    assert shown(3, 1) == "\ufffd The"
    assert shown(2) == ""


@pytest.mark.parametrize(
    ("data", "text", "held"),
    [
        (b"\xe4\xbd", "", b"\xe4\xbd"),  # may become a character
        (b"a\xe4\xbd", "a", b"\xe4\xbd"),
        (b"\xe4\xbdb", "\ufffd\ufffdb", b""),  # never will
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd", b""),  # a surrogate
        (b"\xc0\x80", "\ufffd\ufffd", b""),  # two bytes for what one says
        (b"\xf4\x90", "\ufffd\ufffd", b""),  # beyond Unicode
    ],
)
def test_unfinished_and_invalid_bytes(data: bytes, text: str, held: bytes) -> None:
    assert decode_utf8(data, replaces_each_byte=True, final=False) == (text, held)
    assert decode_utf8(data, replaces_each_byte=True, final=True) == (text + "\ufffd" * len(held), b"")


def test_the_whole_text_is_what_sentencepiece_decodes() -> None:
    path = files("mistral_common") / "data" / "tokenizer.model.v1"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = theirs.vocab_size()
    table = [theirs.id_to_piece(i).replace("\u2581", " ").encode() for i in range(size)]
    table[3:259] = BYTES
    ours = Vocabulary(tuple(table), frozenset({0, 1, 2}), strips_leading_space=True, replaces_each_byte=True)
    rng = random.Random(0)
    multibyte = range(3 + 0x80, 259)
    for _ in range(2000):
        ids = [rng.choice(multibyte) if rng.random() < 0.5 else rng.randrange(259, size) for _ in range(8)]
        decoder = IncrementalDecoder(ours)
        assert "".join(decoder.push([i]) for i in ids) + decoder.flush() == theirs.decode(ids), ids
