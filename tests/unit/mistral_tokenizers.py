"""Mistral's tokenizers, as it publishes them and as transformers saves them."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

from transformers import LlamaTokenizer

DATA = Path(str(files("mistral_common"))) / "data"
MODELS = {"v1": DATA / "tokenizer.model.v1", "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3"}


@cache
def converted(version: str) -> dict[str, bytes]:
    """The files that transformers makes of a SentencePiece model; it takes its time to."""
    with tempfile.TemporaryDirectory() as directory:
        source, saved = Path(directory) / "source", Path(directory) / "saved"
        source.mkdir()
        shutil.copy(MODELS[version], source / "tokenizer.model")
        LlamaTokenizer.from_pretrained(source, add_bos_token=True).save_pretrained(saved)
        return {path.name: path.read_bytes() for path in saved.iterdir()}


def save_converted(version: str, directory: Path) -> Path:
    """tokenizer.json and tokenizer_config.json."""
    for name, content in converted(version).items():
        (directory / name).write_bytes(content)
    return directory
