"""What the small JSON files beside a checkpoint say about its tokens. Reads files; knows no tokenizer library.

tokenizer_config.json    named special tokens, added_tokens_decoder, add_bos_token, chat_template
special_tokens_map.json  named special tokens (older checkpoints)
added_tokens.json        {token: id} (older checkpoints)
generation_config.json, config.json   eos_token_id: one id or a list
chat_template.jinja, additional_chat_templates/*.jinja
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import TokenizerError

_MOST_TOKENS = 1 << 20  # a table of all ids is built: a typing error must not take all memory
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in text before the tokenizer proper sees it."""

    content: str
    special: bool  # a control token: left out of answers, and not for users to write inside a message
    lstrip: bool = False  # swallows the white space before it
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The directory's own words, before any tokenizer is loaded."""

    directory: Path
    named: dict[str, str]  # bos_token -> <s>
    added: dict[int, AddedToken]
    extra_special: tuple[str, ...]  # special by name only: their ids are the vocabulary's
    eos_ids: tuple[int, ...]
    add_bos: bool | None  # None: not said
    add_eos: bool | None
    legacy: bool  # every stretch of text between special tokens starts with a space, not only the first
    add_prefix_space: bool
    templates: dict[str, str]  # by name; the usual one is "default"

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        config = read_json(directory / "tokenizer_config.json")
        mapped = read_json(directory / "special_tokens_map.json")
        named = {name: _content(source[name]) for source in (mapped, config) for name in _NAMES if source.get(name)}
        extra = [
            _content(token)
            for source in (mapped, config)
            for key in ("additional_special_tokens", "extra_special_tokens")
            for token in _values(source.get(key))
        ]
        special = set(named.values()) | set(extra)
        return cls(
            directory=directory,
            named=named,
            added=_added_tokens(directory, config, special),
            extra_special=tuple(dict.fromkeys(extra)),
            eos_ids=_eos_ids(directory),
            add_bos=config.get("add_bos_token"),
            add_eos=config.get("add_eos_token"),
            legacy=config.get("legacy") is True,
            add_prefix_space=config.get("add_prefix_space") is not False,
            templates=_templates(directory, config),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}): copy it again from the checkpoint") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _content(token: Any) -> str:
    """Tokens are spelled as a string or as {"content": ...}."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TokenizerError(f"a special token must be a string or have a string as content, not {token!r}")
    return content


def _values(tokens: Any) -> list[Any]:
    """extra_special_tokens is a list, or a mapping of names to tokens."""
    if isinstance(tokens, dict):
        return list(tokens.values())
    return list(tokens or [])


def _added_tokens(directory: Path, config: dict[str, Any], special: set[str]) -> dict[int, AddedToken]:
    added = {
        _token_id(token_id): AddedToken(token, special=token in special)
        for token, token_id in read_json(directory / "added_tokens.json").items()
    }
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        content = _content(token)
        if not isinstance(token, dict):
            token = {}
        if token.get("single_word"):
            raise TokenizerError(f"{directory / 'tokenizer_config.json'}: single_word of {content!r} is not supported")
        added[_token_id(token_id)] = AddedToken(
            content,
            special=bool(token.get("special")) or content in special,
            lstrip=bool(token.get("lstrip")),
            rstrip=bool(token.get("rstrip")),
        )
    return added


def _token_id(value: Any) -> int:
    """JSON spells an id as a number, or as text where it is a key."""
    if str(value).isdecimal() and (token_id := int(value)) < _MOST_TOKENS:
        return token_id
    raise TokenizerError(f"an added token's id must be a whole number below {_MOST_TOKENS}, not {value!r}")


def _eos_ids(directory: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise TokenizerError(
                    f"{directory / name}: eos_token_id must be a token id or a list of them, not {ids}"
                )
            return tuple(ids)
    return ()


def _templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The templates as files, which take precedence over tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    templates = {"default": file.read_text(encoding="utf-8")} if file.is_file() else {}
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = extra.read_text(encoding="utf-8")
    if templates:
        return templates
    match config.get("chat_template"):
        case None:
            return {}
        case str(template):
            return {"default": template}
        case [*named] if all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in named):
            return {entry["name"]: entry["template"] for entry in named}
    raise TokenizerError(
        f"{directory / 'tokenizer_config.json'}: chat_template must be a string or a list of {{name, template}}"
    )
