"""Text to token ids, by the library that the checkpoint's tokenizer file belongs to.

    tokenizer.json                     `tokenizers`, exactly as the file says
    tokenizer.model, tokenizer.model.v3  `sentencepiece`; the special tokens in a text are found here

Both find special tokens in a text ("<s>" becomes one id, as chat templates need), except those that
shield.py broke up. Both tell what each id adds to a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from model.detokenizer import Vocabulary
from model.errors import TokenizerError
from model.shield import BREAK
from model.tokenizer_files import AddedToken, TokenizerFiles, read_json

_WORD = "\u2581"  # how SentencePiece writes a space
# normalizer_spec.add_dummy_prefix = false; a protobuf message appended to another overrides its fields.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class TextEncoder(Protocol):
    """One tokenizer library, loaded."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def named(self) -> dict[str, str]:
        """Special tokens by name (bos_token, ...) that the tokenizer's own file names."""

    @property
    def added_by_default(self) -> tuple[list[int], list[int]]:
        """The ids before and after a text where tokenizer_config.json does not say."""

    def encode(self, text: str, *, shielded: bool = False) -> list[int]:
        """Special tokens become their ids; where shielded, every BREAK is taken out after that."""

    def id_of(self, token: str) -> int | None: ...


class SentencePieceEncoder:
    """A `tokenizer.model`. Control pieces and added tokens are cut out of a text before SentencePiece sees the rest."""

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        proto = path.read_bytes()
        try:
            self._opening = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._inside = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_PREFIX)
        except RuntimeError as error:
            raise TokenizerError(f"{path} is not a SentencePiece model: copy it again from the checkpoint") from error
        if not files.add_prefix_space:
            self._opening = self._inside
        if files.legacy:
            self._inside = self._opening
        added = _control_pieces(self._opening) | files.added
        names = {*files.named.values(), *files.extra_special}
        for name in names - {token.content for token in added.values()}:
            if (token_id := _piece_id(self._opening, name)) is not None:
                added[token_id] = AddedToken(name, special=True)
        self._ids = {token.content: i for i, token in added.items()}
        self._finder = _finder(added.values())
        self.vocabulary = _sentencepiece_vocabulary(self._opening, added)

    @property
    def named(self) -> dict[str, str]:
        ids = {"bos_token": self._opening.bos_id(), "eos_token": self._opening.eos_id()}
        return {name: self._opening.id_to_piece(i) for name, i in ids.items() if i >= 0}

    @property
    def added_by_default(self) -> tuple[list[int], list[int]]:
        bos_id = self._opening.bos_id()
        return ([bos_id] if bos_id >= 0 else []), []

    def id_of(self, token: str) -> int | None:
        return self._ids[token] if token in self._ids else _piece_id(self._opening, token)

    def encode(self, text: str, *, shielded: bool = False) -> list[int]:
        ids: list[int] = []
        processor = self._opening
        end = 0
        for match in self._finder.finditer(text):
            ids += _encode_piece(processor, text[end : match.start()], shielded)
            ids.append(self._ids.get(match[0]) or self._ids[match[0].strip()])
            processor = self._inside
            end = match.end()
        return ids + _encode_piece(processor, text[end:], shielded)


class TokenizersEncoder:
    """A `tokenizer.json`, obeyed as written: normalizer, pre-tokenizer and special tokens are the file's."""

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        self._path = path
        self._files = files
        data = read_json(path)
        self._tokenizer = self._load(path.read_text(encoding="utf-8"))
        self.vocabulary = _tokenizers_vocabulary(self._tokenizer, data, path)

    @property
    def named(self) -> dict[str, str]:
        return {}

    @property
    def added_by_default(self) -> tuple[list[int], list[int]]:
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        for before in range(len(full) - len(bare) + 1):
            if full[before : before + len(bare)] == bare:
                return full[:before], full[before + len(bare) :]
        raise TokenizerError(f"{self._path}: its post_processor changes the text's own ids, which is not supported")

    def id_of(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def encode(self, text: str, *, shielded: bool = False) -> list[int]:
        tokenizer = self._unshielding if shielded else self._tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _unshielding(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which takes every BREAK out after it has looked for special tokens.

        Special tokens are looked for before the normalizer runs, if they are not `normalized` themselves.
        """
        data = read_json(self._path)
        for token in data.get("added_tokens", []):
            token["normalized"] = token["normalized"] and not token["special"]
        unshield = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
        normalizers = [unshield, data["normalizer"]] if data.get("normalizer") else [unshield]
        data["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
        return self._load(json.dumps(data))

    def _load(self, data: str) -> tokenizers.Tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(data)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{self._path} cannot be loaded ({error}): copy it again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        for token_id, token in sorted(self._files.added.items()):
            if token.content not in known:
                _add(tokenizer, token)
                if tokenizer.token_to_id(token.content) != token_id:
                    raise TokenizerError(
                        f"{self._path.parent}: {token.content!r} is token {token_id} in tokenizer_config.json "
                        f"but {tokenizer.token_to_id(token.content)} in tokenizer.json"
                    )
        for content in (*self._files.named.values(), *self._files.extra_special):
            if content not in known and tokenizer.token_to_id(content) is not None:
                _add(tokenizer, AddedToken(content, special=True))
        return tokenizer


def _add(tokenizer: tokenizers.Tokenizer, token: AddedToken) -> None:
    added = tokenizers.AddedToken(
        token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=token.special
    )
    (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([added])


def _piece_id(processor: sentencepiece.SentencePieceProcessor, piece: str) -> int | None:
    token_id: int = processor.piece_to_id(piece)  # the unknown token's, where there is no such piece
    return token_id if processor.id_to_piece(token_id) == piece else None


def _encode_piece(processor: sentencepiece.SentencePieceProcessor, text: str, shielded: bool) -> list[int]:
    if shielded:
        text = text.replace(BREAK, "")
    ids: list[int] = processor.encode(text) if text else []
    return ids


def _finder(added: Iterable[AddedToken]) -> re.Pattern[str]:
    """Finds the leftmost added token, the longest where several begin."""
    longest_first = sorted(added, key=lambda token: len(token.content), reverse=True)
    patterns = [
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in longest_first
    ]
    return re.compile("|".join(patterns) or r"(?!)")


def _control_pieces(processor: sentencepiece.SentencePieceProcessor) -> dict[int, AddedToken]:
    return {
        i: AddedToken(processor.id_to_piece(i), special=True)
        for i in range(processor.vocab_size())
        if processor.is_control(i)
    }


def _sentencepiece_vocabulary(
    processor: sentencepiece.SentencePieceProcessor, added: Mapping[int, AddedToken]
) -> Vocabulary:
    size = max([processor.vocab_size(), *(i + 1 for i in added)])
    token_bytes = [b""] * size
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        token_bytes[i] = bytes([int(piece[1:-1], 16)]) if processor.is_byte(i) else _word_bytes(piece)
    for i, token in added.items():
        token_bytes[i] = token.content.encode()
    special = {i for i, token in added.items() if token.special} | {processor.unk_id()}
    return Vocabulary(
        tuple(token_bytes),
        frozenset(special),
        strips_leading_space=processor.normalize("a").startswith(_WORD),
        replaces_each_byte=True,
    )


def _tokenizers_vocabulary(tokenizer: tokenizers.Tokenizer, data: dict[str, Any], path: Path) -> Vocabulary:
    decoder = data.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    byte_level = kinds == ["ByteLevel"]
    if not byte_level and kinds not in (_FALLBACK, [*_FALLBACK, "Strip"]):
        raise TokenizerError(f"{path}: decoder {kinds} is not supported; {[*_FALLBACK, 'Strip']} and ['ByteLevel'] are")
    added = tokenizer.get_added_tokens_decoder()
    pieces = tokenizer.get_vocab(with_added_tokens=True)
    token_bytes = [b""] * (max(pieces.values(), default=-1) + 1)
    for piece, i in pieces.items():
        token_bytes[i] = piece.encode() if i in added else _level_bytes(piece) if byte_level else _fallback_bytes(piece)
    return Vocabulary(
        tuple(token_bytes),
        frozenset(i for i, token in added.items() if token.special),
        strips_leading_space=kinds[-1] == "Strip",
        replaces_each_byte=not byte_level,
    )


_FALLBACK = ["Replace", "ByteFallback", "Fuse"]
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _word_bytes(piece: str) -> bytes:
    return piece.replace(_WORD, " ").encode()


def _fallback_bytes(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else _word_bytes(piece)


def _level_bytes(piece: str) -> bytes:
    return bytes(_LEVEL[character] for character in piece)


def _level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a visible character: itself where it is one, else the next from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)}
    alphabet = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if byte not in visible)
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_LEVEL = _level_alphabet()
