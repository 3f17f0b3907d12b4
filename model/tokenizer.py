"""Text and conversations to token ids and back, for one checkpoint.

    directory ──tokenizer_files──▶ what the JSON files say ─┐
              ──text_encoders────▶ text -> ids, the table ──┼──▶ Tokenizer
              ──chat_template────▶ messages -> text ────────┘        └──detokenizer──▶ ids -> text

A chat prompt is the template's text, where special tokens are found ("<s>" becomes one id); inside what users send
they stay plain text (shield.py), so that nobody ends a turn or opens another by writing one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.chat_template import ChatTemplate
from model.detokenizer import IncrementalDecoder, Vocabulary, decode_utf8
from model.errors import TokenizerError
from model.instruct_format import Text, mistral_instruct
from model.shield import BREAK, Shield
from model.text_encoders import SentencePieceEncoder, TextEncoder, TokenizersEncoder
from model.tokenizer_files import TokenizerFiles


def load_tokenizer(directory: Path) -> Tokenizer:
    """From tokenizer.json if there is one, else from tokenizer.model, else from the newest tokenizer.model.v*."""
    files = TokenizerFiles.read(directory)
    if (directory / "tokenizer.json").is_file():
        return Tokenizer(TokenizersEncoder(directory / "tokenizer.json", files), files)
    models = [directory / "tokenizer.model", *sorted(directory.glob("tokenizer.model.v*"), reverse=True)]
    for model in models:
        if model.is_file():
            return Tokenizer(SentencePieceEncoder(model, files), files)
    raise TokenizerError(
        f"{directory} has no tokenizer.json, tokenizer.model or tokenizer.model.v*: copy one from the checkpoint"
    )


class Tokenizer:
    """All that the server knows about a checkpoint's tokens. Immutable; safe to share between threads."""

    def __init__(self, encoder: TextEncoder, files: TokenizerFiles) -> None:
        self._encoder = encoder
        self._vocabulary: Vocabulary = encoder.vocabulary
        named = encoder.named | files.named
        self.bos_id = _named_id(encoder, named, "bos_token")
        self._eos_id = _named_id(encoder, named, "eos_token")
        # What generation may end with: the checkpoint's ids and the tokenizer's own, which fine-tunes often differ in.
        self.eos_ids = tuple(dict.fromkeys([*files.eos_ids, *([] if self._eos_id is None else [self._eos_id])]))
        before, after = encoder.added_by_default
        if files.add_bos is not None:
            before = [self.bos_id] if files.add_bos and self.bos_id is not None else []
        if files.add_eos is not None:
            after = [self._eos_id] if files.add_eos and self._eos_id is not None else []
        self._before, self._after = before, after
        self._templates = {name: ChatTemplate(source, named) for name, source in files.templates.items()}
        self._shield = Shield(self.token_text(i) for i in self._vocabulary.special)

    @property
    def vocab_size(self) -> int:
        """Ids are below this. The model's own vocabulary may be padded beyond it."""
        return len(self._vocabulary)

    @property
    def vocabulary(self) -> Vocabulary:
        """What each id adds to a text."""
        return self._vocabulary

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, in which special tokens are found; between BOS and EOS where the checkpoint adds them."""
        ids = self._encoder.encode(_checked(text))
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        decoder = self.incremental(skip_special_tokens=skip_special_tokens)
        return decoder.push(ids) + decoder.flush()

    def incremental(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True, opens_message: bool = False
    ) -> IncrementalDecoder:
        """Decodes what follows a prompt; without one, a text of its own, without its first word's leading space.

        A completion continues its prompt's text: give the prompt ("The capital is" + " Paris"). An assistant's
        message is a text of its own, and its first word's space belongs to the tokenizer or to the template
        ("[/INST] Paris"), not to the message: give none, and with opens_message "Paris" comes without it, whichever
        of the two it is. Both write it again when the message is sent back as history.
        """
        return IncrementalDecoder(self._vocabulary, prompt_ids, skip_special_tokens, opens_message)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; of a special token, its name; nothing of an id the tokenizer does not have."""
        return self._vocabulary.bytes_of((token_id,), skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """token_bytes as text, U+FFFD for a part of a character."""
        return decode_utf8(self.token_bytes(token_id), self._vocabulary.replaces_each_byte, final=True)[0]

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> list[int]:
        """The prompt of a conversation. BOS is there if the template writes it; nothing else adds one.

        Without a template it is Mistral's instruct format, which has no tools.
        """
        template = self._template(with_tools=bool(tools))
        if template is None:
            if tools or template_arguments:
                raise TokenizerError("this model has no chat template: add chat_template.jinja for tools and arguments")
            return self._instruct_prompt(messages)
        text = template.render(
            self._shield.cover(messages),
            add_generation_prompt=add_generation_prompt,
            tools=self._shield.cover(tools),
            **self._shield.cover(template_arguments),
        )
        return self._encoder.encode(_checked(text), shielded=BREAK in text)

    def _template(self, with_tools: bool) -> ChatTemplate | None:
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if self._templates and "default" not in self._templates:
            raise TokenizerError(f"none of the chat templates {sorted(self._templates)} is named default: rename one")
        return self._templates.get("default")

    def _instruct_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        control = {"bos": self.bos_id, "eos": self._eos_id}
        control |= {token: self._encoder.id_of(token) for token in ("[INST]", "[/INST]")}
        ids: list[int] = []
        for part in mistral_instruct(messages, control_tokens=control["[INST]"] is not None):
            if isinstance(part, Text):
                ids += self._encoder.encode(self._shield.cover(_checked(part.text)), shielded=True)
            elif (token_id := control[part]) is not None:
                ids.append(token_id)
        return ids


def _named_id(encoder: TextEncoder, named: Mapping[str, str], name: str) -> int | None:
    if name not in named:
        return None
    token_id = encoder.id_of(named[name])
    if token_id is None:
        raise TokenizerError(
            f"{name} is {named[name]!r}, which has no id: add it to added_tokens_decoder, or correct it"
        )
    return token_id


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has half a surrogate pair at character {error.start}: send whole characters"
        ) from error
    return text
