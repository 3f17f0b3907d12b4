"""What a rank does for a step before it can compute, and what of it a step has to wait for.

    python -m tests.bench.prepare_overhead

Milliseconds per step of so many decoding sequences with 1,000 tokens of context. "prepare" lies beside the computing of
the step before (cluster/step_line.py), "fill in" does not: the copy to the device, and the tokens just sampled.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from cluster.messages import LAST_SAMPLED, SamplingParams, SequenceChunk, SequenceStart, StepPlan
from cluster.rank_state import RankState
from model.config import MixtralConfig
from model.grammar import Matcher
from model.kv_cache import KVCache
from model.shard import Shard
from tests.tiny import CONFIG

PAGE = 16
CONTEXT = 1000
STEPS = 100
PAGES = -(-(CONTEXT + STEPS) // PAGE)  # of each sequence
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0.0, seed=0)


def no_grammar(grammar: object) -> Matcher:
    raise AssertionError


def measure(sequences: int) -> tuple[float, float]:
    kv = KVCache(
        MixtralConfig.from_dict(CONFIG, "tiny"),
        Shard(),
        num_pages=sequences * PAGES,
        page_size=PAGE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    state = RankState(
        (2,), CONFIG["vocab_size"], no_grammar, kv, seats=sequences, max_tokens=2048, group=0, samples=True
    )
    last_ids = torch.zeros(sequences, dtype=torch.int64)
    prompt = tuple(range(5, 5 + CONTEXT))
    for seq in range(sequences):
        pages = tuple(range(seq * PAGES, (seq + 1) * PAGES))
        start = SequenceStart(seq, prompt, CONTEXT, GREEDY)
        state.take(StepPlan(seq, (SequenceChunk(seq, prompt, 0, pages, False),), (start,)))
    prepare, fill_in = [], []
    for step in range(STEPS):
        position = CONTEXT + step
        plan = StepPlan(0, tuple(SequenceChunk(s, (LAST_SAMPLED,), position, (), True) for s in range(sequences)))
        began = perf_counter()
        taken = state.take(plan)
        prepared = perf_counter()
        taken.numbers.send(last_ids)
        prepare.append(prepared - began)
        fill_in.append(perf_counter() - prepared)
    return median(prepare) * 1e3, median(fill_in) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'sequences':>10}{'prepare ms':>12}{'fill in ms':>12}")
    for sequences in (1, 8, 32, 64, 256):
        prepare, fill_in = measure(sequences)
        print(f"{sequences:>10}{prepare:>12.3f}{fill_in:>12.3f}")


if __name__ == "__main__":
    main()
