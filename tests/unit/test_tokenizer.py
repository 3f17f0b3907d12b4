"""The tokenizer against the libraries it must agree with: mistral-common, sentencepiece and transformers."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from transformers import LlamaTokenizer

from model.errors import TokenizerError
from model.tokenizer import Tokenizer, load_tokenizer
from tests.unit.mistral_tokenizers import MODELS, save_converted

PIECES = [
    *["the ", "router", " chooses", " two", "Experts", "\n", "\n\n", "\t", " ", "  ", "   ", "\u00a0", "\u2003"],
    *[
        "é",
        "e\u0301",
        "你好",
        "نص",
        "ไทย",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "𝕏",
        "\U0001f600",
        "\u200b",
        "\ufeff",
        "\u2581",
        "\ufffd",
    ],
    *["\x00", "\x01", "\x7f", "\r\n", "\ufdd0", "\U0010ffff", "<", ">", "<s", "/s>", "[INST", "<0x41>", "0", "1234"],
    *["def f(x):\n    return x", "https://a.b/c?d=e", "...", "!!", "'s", "I'm", "A" * 40, "ß", "İ", "ﬁ", "①", "々"],
]
SPECIALS = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]"]
MANY = 500 if os.environ.get("MIXTRAL_TEST_ALL") else 200


def texts(count: int, seed: int, pieces: list[str] = PIECES) -> list[str]:
    rng = random.Random(seed)
    return ["", " ", *("".join(rng.choices(pieces, k=rng.randrange(1, 12))) for _ in range(count))]


@pytest.fixture(scope="module", params=["v1", "v3"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_directory(version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as Mistral publishes it: the SentencePiece model under its versioned name, and nothing else."""
    directory = tmp_path_factory.mktemp("model")
    shutil.copy(MODELS[version], directory / f"tokenizer.model.{version}")
    return directory


@pytest.fixture(scope="module")
def json_directory(version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers saves it: tokenizer.json and tokenizer_config.json."""
    return save_converted(version, tmp_path_factory.mktemp("json"))


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(model_directory: Path) -> Tokenizer:
    return load_tokenizer(model_directory)


@pytest.fixture(scope="module")
def json_tokenizer(json_directory: Path) -> Tokenizer:
    return load_tokenizer(json_directory)


def test_sentencepiece_equals_mistral_common(sentencepiece_tokenizer: Tokenizer, model_directory: Path) -> None:
    (path,) = model_directory.iterdir()
    theirs = SentencePieceTokenizer(str(path))
    ours = sentencepiece_tokenizer
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (theirs.n_words, theirs.bos_id, (theirs.eos_id,))
    for text in texts(4 * MANY, seed=1):
        if any(special in text for special in SPECIALS):
            continue  # special tokens to us, plain text to them
        ids = theirs.encode(text, bos=True, eos=False)
        assert ours.encode(text) == ids, ascii(text)
        assert ours.encode(text, add_special_tokens=False) == ids[1:], ascii(text)
        assert ours.decode(ids) == theirs.decode(ids, SpecialTokenPolicy.IGNORE), ascii(text)
        assert ours.decode(ids) == text.replace("\u2581", " "), ascii(text)


def test_tokenizer_json_equals_transformers(json_tokenizer: Tokenizer, json_directory: Path) -> None:
    theirs = LlamaTokenizer.from_pretrained(json_directory)
    ours = json_tokenizer
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (len(theirs), theirs.bos_token_id, (theirs.eos_token_id,))
    for text in texts(2 * MANY, seed=2, pieces=PIECES + SPECIALS):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, ascii(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ascii(text)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids), ascii(text)


def test_special_tokens_in_a_text_mean_the_same_to_both_encoders(
    sentencepiece_tokenizer: Tokenizer, json_tokenizer: Tokenizer
) -> None:
    """Where transformers' conversion of the model is faithful, that is without runs of spaces and separators."""
    pieces = ["hello", "world", ",", "你好", "\n", "!", "<s>", "</s>", "<s", "s>", "[INST]", "[/INST]"]
    for text in texts(MANY, seed=3, pieces=pieces)[2:]:
        assert sentencepiece_tokenizer.encode(text) == json_tokenizer.encode(text), ascii(text)


def test_what_a_token_adds_joins_to_the_text(sentencepiece_tokenizer: Tokenizer) -> None:
    tokenizer = sentencepiece_tokenizer
    for text in texts(200, seed=4)[1:]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == (" " + text.replace("\u2581", " ")).encode()
    *_, first, second, third, fourth = tokenizer.encode("\U0010ffff")
    assert [tokenizer.token_bytes(i) for i in (first, second, third, fourth)] == [b"\xf4", b"\x8f", b"\xbf", b"\xbf"]
    assert tokenizer.token_text(first) == "\ufffd"
    assert tokenizer.token_text(1) == "<s>"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_refused_in_words(text: str, sentencepiece_tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=f"surrogate pair at character {len(text) - len(text.lstrip('a'))}"):
        sentencepiece_tokenizer.encode(text)


def test_a_long_text_is_encoded_whole(sentencepiece_tokenizer: Tokenizer) -> None:
    text = "a router looks at every token, 你好 " * 5_000
    assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode(text)) == text


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shutil.copy(MODELS["v1"], tmp_path / "tokenizer.model")
    return tmp_path


def test_eos_ids_are_the_checkpoints_and_the_tokenizers(directory: Path) -> None:
    write_json(directory / "config.json", {"eos_token_id": 7})
    assert load_tokenizer(directory).eos_ids == (7, 2)
    write_json(directory / "generation_config.json", {"eos_token_id": [5, 2]})
    assert load_tokenizer(directory).eos_ids == (5, 2)
    write_json(directory / "generation_config.json", {"eos_token_id": "two"})
    with pytest.raises(TokenizerError, match="eos_token_id must be a token id"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [1, 12014]),
        ({"add_bos_token": False}, [12014]),
        ({"add_eos_token": True, "eos_token": {"content": "</s>"}}, [1, 12014, 2]),
        ({"bos_token": "</s>", "add_bos_token": True}, [2, 12014]),
    ],
)
def test_tokenizer_config_says_what_surrounds_a_text(directory: Path, config: Any, expected: list[int]) -> None:
    write_json(directory / "tokenizer_config.json", config)
    assert load_tokenizer(directory).encode("hi") == expected


def test_a_name_without_an_id_is_plain_text(directory: Path) -> None:
    plain = load_tokenizer(directory).encode("[PAD]")
    write_json(directory / "tokenizer_config.json", {"pad_token": "[PAD]", "extra_special_tokens": {"x": "[X]"}})
    assert load_tokenizer(directory).encode("[PAD]") == plain
    assert load_tokenizer(directory).vocab_size == 32000


def test_legacy_puts_a_space_after_special_tokens(directory: Path) -> None:
    spaced = load_tokenizer(directory).encode("<s> hi", add_special_tokens=False)
    plain = load_tokenizer(directory).encode("<s>hi", add_special_tokens=False)
    write_json(directory / "tokenizer_config.json", {"legacy": True})
    assert load_tokenizer(directory).encode("<s>hi", add_special_tokens=False) == spaced != plain


def added_by_config(directory: Path) -> None:
    decoder = {
        "32000": {"content": "<|im_end|>", "rstrip": True},  # special because eos_token names it
        "32001": {"content": "<|im_start|>"},
    }
    write_json(directory / "tokenizer_config.json", {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"})


def added_by_files(directory: Path) -> None:
    write_json(directory / "added_tokens.json", {"<|im_end|>": 32000, "<|im_start|>": 32001})
    write_json(directory / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})


@pytest.mark.parametrize("add", [added_by_config, added_by_files])
def test_added_tokens(directory: Path, add: Callable[[Path], None]) -> None:
    add(directory)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocab_size == 32002
    assert tokenizer.eos_ids == (32000,)
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>  ", add_special_tokens=False)
    swallowed = add is added_by_config
    assert ids[0] == 32001
    assert (ids[-1] == 32000) is swallowed
    assert tokenizer.decode(ids) == "<|im_start|>hi" + ("" if swallowed else "  ")
    assert tokenizer.token_text(32000) == "<|im_end|>"
    assert tokenizer.decode([0, 1, 2, 32000]) == ""


def test_the_longest_added_token_is_found(directory: Path) -> None:
    write_json(directory / "added_tokens.json", {"<x>": 32000, "<x>y": 32001})
    assert load_tokenizer(directory).encode("<x>y<x>", add_special_tokens=False) == [32001, 32000]


def test_without_a_prefix_space_a_text_begins_as_it_is_written(directory: Path) -> None:
    write_json(directory / "tokenizer_config.json", {"add_prefix_space": False})
    tokenizer = load_tokenizer(directory)
    for text in ["hello", " hello", "<s>hello"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def byte_level(tmp_path: Path) -> Path:
    """GPT-2's kind of tokenizer.json, with nothing but bytes in its vocabulary."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokenizer_json_learns_tokens_from_tokenizer_config(tmp_path: Path) -> None:
    size = load_tokenizer(byte_level(tmp_path)).vocab_size
    added = {"content": "<|im_start|>", "special": True}
    named = {"eos_token": "!", "pad_token": "<pad>"}  # one has an id without being an added token, one has none
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(size): added}, **named})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_start|>") == [size]
    assert tokenizer.decode(tokenizer.encode("a!b<pad>")) == "ab<pad>"
    assert tokenizer.vocab_size == size + 1
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(size + 1): added}})
    with pytest.raises(TokenizerError, match=f"is token {size + 1} in tokenizer_config.json but {size}"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_neither_truncates_nor_pads(tmp_path: Path) -> None:
    data = json.loads((byte_level(tmp_path) / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    data["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    write_json(tmp_path / "tokenizer.json", data)
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("abcd")) == "abcd"


def test_byte_level_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    for text in texts(300, seed=5):
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("你")[:2]) == "\ufffd"


def broken(directory: Path, name: str, content: str) -> Path:
    (directory / name).write_text(content)
    return directory


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.txt", "", "has no tokenizer.json, tokenizer.model"),
        ("tokenizer.model", "nonsense", "is not a SentencePiece model"),
        ("tokenizer.json", "{", "is not valid JSON"),
        ("tokenizer.json", "[]", "must hold a JSON object"),
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("added_tokens.json", '{"<x>": -1}', "id must be a whole number below 1048576, not -1"),
        ("added_tokens.json", '{"<x>": 1048576}', "id must be a whole number below 1048576"),
        ("special_tokens_map.json", '{"eos_token": "<x>"}', "eos_token is '<x>', which has no id"),
        ("special_tokens_map.json", '{"eos_token": 7}', "must be a string or have a string as content, not 7"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": {"content": "x", "single_word": true}}}',
            "single_word",
        ),
    ],
)
def test_broken_files_are_refused_in_words(directory: Path, name: str, content: str, message: str) -> None:
    if name == "nothing.txt":
        (directory / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(broken(directory, name, content))


def test_a_decoder_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    data = json.loads((byte_level(tmp_path) / "tokenizer.json").read_text())
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    write_json(tmp_path / "tokenizer.json", data)
    with pytest.raises(TokenizerError, match=r"decoder \['WordPiece'\] is not supported"):
        load_tokenizer(tmp_path)


def test_the_newest_model_is_taken(tmp_path: Path) -> None:
    for version, path in MODELS.items():
        shutil.copy(path, tmp_path / f"tokenizer.model.{version}")
    assert load_tokenizer(tmp_path).vocab_size == 32768
    shutil.copy(MODELS["v1"], tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).vocab_size == 32000
