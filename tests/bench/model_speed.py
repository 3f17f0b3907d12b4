"""Prompt and decode speed of the model alone, beside transformers with the same weights, in one run.

    python tests/bench/model_speed.py [--threads 2] [--prompt 128] [--steps 32]

Random weights of a middle size (791 M parameters, 230 M active), bfloat16 by default. A decode step is timed by its
median, ours and theirs by turns, so that a busy machine is unfair to both alike.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import transformers

from model.batch import Batch, SequenceSpan
from model.checkpoint import load_weights
from model.config import load_config
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.shard import Shard

PAGE = 16
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "max_position_embeddings": 4096,
}


class Ours:
    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        config = load_config(directory)
        weights = load_weights(directory, config, Shard(), dtype=dtype, device=torch.device("cpu"))
        self._model, self._dtype = Mixtral(config, weights), dtype

    def start(self, tokens_BL: torch.Tensor, room: int) -> None:
        """Forget everything; compute the prompts."""
        config = self._model.config
        self._streams, self._length = len(tokens_BL), 0
        self._pages = -(-room // PAGE)
        pages, cpu = self._pages * self._streams, torch.device("cpu")
        self._kv = KVCache(config, Shard(), num_pages=pages, page_size=PAGE, dtype=self._dtype, device=cpu)
        self._exchange = OneRank(config.num_local_experts)
        self._next = tokens_BL
        self.step()

    def step(self) -> None:
        """Compute what is new and choose each stream's next token."""
        B, L = self._next.shape
        first, self._length = self._length, self._length + L
        position_BL = torch.arange(first, self._length).expand(B, L)
        slot_BL = position_BL + torch.arange(B)[:, None] * (self._pages * PAGE)
        spans = tuple(SequenceSpan(b * L, L, self._length, ((b * self._pages, self._pages),)) for b in range(B))
        last_B = torch.arange(L - 1, B * L, L)
        batch = Batch(self._next.flatten(), position_BL.flatten(), slot_BL.flatten(), spans, last_B)
        logits_BV = self._model.logits(self._model.forward(batch, self._kv, self._exchange))
        self._next = logits_BV.argmax(-1, keepdim=True)


class Theirs:
    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._model = transformers.MixtralForCausalLM.from_pretrained(directory, dtype=dtype)

    def start(self, tokens_BL: torch.Tensor, room: int) -> None:
        self._cache = transformers.DynamicCache(config=self._model.config)
        self._next = tokens_BL
        self.step()

    @torch.inference_mode()
    def step(self) -> None:
        answer = self._model(self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next = answer.logits[:, -1].argmax(-1, keepdim=True)


def seconds(function: Callable[[], None]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).to(dtype).save_pretrained(directory)
        load = perf_counter()
        ours = Ours(directory, dtype)
        print(f"ours loaded and packed in {perf_counter() - load:.1f} s; {args.dtype}, {args.threads} threads")
        theirs = Theirs(directory, dtype)
    room = args.prompt + args.steps + 1
    print(f"{'':>8}{'prefill tok/s':>28}{'decode tok/s':>28}")
    print(f"{'streams':>8}" + f"{'ours':>10}{'theirs':>10}{'ratio':>8}" * 2)
    for streams in (1, 8, 32):
        tokens_BL = torch.randint(0, SIZES["vocab_size"], (streams, args.prompt))
        for side in (ours, theirs):  # once for caches and allocators
            side.start(tokens_BL[:, :8], room)
        prompt = [seconds(partial(side.start, tokens_BL, room)) for side in (ours, theirs)]
        steps = [(seconds(ours.step), seconds(theirs.step)) for _ in range(args.steps)]
        decode = [median(times) for times in zip(*steps, strict=True)]
        row = f"{streams:>8}"
        for tokens, (mine, other) in ((streams * args.prompt, prompt), (streams, decode)):
            row += f"{tokens / mine:>10.0f}{tokens / other:>10.0f}{other / mine:>8.2f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
