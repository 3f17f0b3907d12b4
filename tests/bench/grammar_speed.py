"""What grammars cost: compiling them, and masking a step's logits, at Mixtral's vocabulary of 32,000 tokens.

    python -m tests.bench.grammar_speed [--tokens 200]

Each grammar walks a random answer. "mask" is Matcher.mask(), "accept" Matcher.accept(): medians, and the worst of the
walk. Then whole steps: apply_grammars on rows that are all inside a JSON object, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from model.grammar import GrammarCompiler, Matcher, apply_grammars
from model.grammar_text import GrammarKind
from model.tokenizer import Tokenizer, load_tokenizer

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "friends": {"type": "array", "items": {"$ref": "#"}},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": False,
}
_WIDE = {"type": "object", "properties": {f"field_{i}": {"type": "string"} for i in range(300)}}
GRAMMARS: dict[str, tuple[GrammarKind, str]] = {
    "JSON object": ("json_object", ""),
    "person, recursive": ("json_schema", json.dumps(_PERSON)),
    "300 optional properties": ("json_schema", json.dumps(_WIDE)),
    "regex, a date": ("regex", r"\d{4}-\d{2}-\d{2}"),
    "regex, any text": ("regex", r"(?s:.)*"),
    "regex, exponential": ("regex", r"(a|b)*a(a|b){200}"),
    "1,000 choices": ("choice", json.dumps([f"choice number {i * i}" for i in range(1000)])),
    "Lark, sums": ("lark", 'start: t (/[+-]/ t)*\nt: N | "(" start ")"\nN: /[0-9]+/\n%ignore / /'),
}


def mixtral_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as name:
        shutil.copy(Path(str(files("mistral_common"))) / "data/tokenizer.model.v1", Path(name) / "tokenizer.model")
        return load_tokenizer(Path(name))


def allowed(mask: bytes) -> list[int]:
    ids: list[int] = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little").nonzero()[0].tolist()
    return ids


def walk(matcher: Matcher, tokens: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """Seconds of each mask and of each accept along a random answer."""
    rng = random.Random(seed)
    masks: list[float] = []
    accepts: list[float] = []
    while len(masks) < tokens and not matcher.finished:
        began = perf_counter()
        mask = matcher.mask()
        masked = perf_counter()
        choices = allowed(mask)
        token_id = rng.choice([i for i in choices if i != 2] or choices)
        chosen = perf_counter()
        matcher.accept(token_id)
        masks.append(masked - began)
        accepts.append(perf_counter() - chosen)
    return masks, accepts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=200)
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    tokenizer = mixtral_tokenizer()
    began = perf_counter()
    compiler = GrammarCompiler(tokenizer.vocabulary, tokenizer.eos_ids, tokenizer.vocab_size)
    print(f"vocabulary of {tokenizer.vocab_size} read in {1e3 * (perf_counter() - began):.0f} ms\n")
    print(f"{'milliseconds':26} compile  copy    mask   worst  accept   worst  tokens")
    for name, (kind, text) in GRAMMARS.items():
        began = perf_counter()
        grammar = compiler.compile(kind, text)
        compiled = perf_counter()
        matcher = grammar.matcher()
        copied = perf_counter()
        masks, accepts = walk(matcher, tokens)
        times = [compiled - began, copied - compiled, median(masks), max(masks), median(accepts), max(accepts)]
        print(f"{name:26}" + "".join(f"{1e3 * seconds:8.3f}" for seconds in times) + f"{len(masks):8}")
    print("\nrows in a JSON object   apply_grammars, ms")
    grammar = compiler.compile("json_schema", json.dumps(_PERSON))
    for rows in (1, 8, 32, 128):
        matchers = {row: grammar.matcher() for row in range(rows)}
        for row, matcher in matchers.items():
            walk(matcher, 10 + row % 5, seed=row)
        logits_RV = torch.randn(rows, tokenizer.vocab_size)
        times = []
        for _ in range(25):
            began = perf_counter()
            failed = apply_grammars(logits_RV, matchers)
            times.append(perf_counter() - began)
            assert not failed
        print(f"{rows:21} {1e3 * median(times):20.2f}")


if __name__ == "__main__":
    main()
