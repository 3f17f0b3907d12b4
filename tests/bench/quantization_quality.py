"""What each quantisation costs the demo model, on questions that its training never saw.

    python -m tests.bench.quantization_quality [--questions 1600]

Perplexity and exact answers are measured against the corpus' own answers; agreement against the greedy answers of the
model as it is: a token agrees where it has the highest logit after the same tokens, an answer where all of its tokens
do, which is when greedy decoding gives the same text. Activations are float32. No figure depends on the machine.

T rows.  R rows whose logits are wanted.  V vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.resources
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from model.batch import Batch, SequenceSpan
from model.checkpoint import load_weights
from model.config import load_config
from model.demo.corpus.conversation import Corpus
from model.demo.data import EOS, Encoder
from model.demo.evaluation import LONGEST_ANSWER, held_out
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.modes import Mode
from model.shard import Shard

CPU = torch.device("cpu")
MODES: tuple[Mode | None, ...] = (None, "int8", "fp8", "int4", "nf4")
GROUP = 64  # texts at once
PAGE, PAGES_EACH = 16, 32


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    answer: list[int]


class Model:
    """The demo model with weights in one mode."""

    def __init__(self, directory: Path, mode: Mode | None) -> None:
        self._config = load_config(directory)
        weights = load_weights(directory, self._config, Shard(), dtype=torch.float32, device=CPU, quantization=mode)
        self.weight_bytes = weights.nbytes
        projections = [linear for block in weights.blocks for linear in (block.qkv, block.output)]
        projections += [x for block in weights.blocks for e in block.experts for x in (e.gate_up, e.down)]
        count = sum(linear.in_features * linear.out_features for linear in projections)
        self.bits = 8 * sum(linear.nbytes for linear in projections) / count
        self._model = Mixtral(self._config, weights)
        self._kv = KVCache(
            self._config,
            Shard(),
            num_pages=GROUP * PAGES_EACH,
            page_size=PAGE,
            dtype=torch.float32,
            device=CPU,
        )

    def logits(self, texts: Sequence[list[int]], places: Sequence[int], *, goes_on: bool = False) -> list[Tensor]:
        """For each text, logits after each token; of one that goes on, after the last alone. Places: of its pages."""
        spans: list[SequenceSpan] = []
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for text, place in zip(texts, places, strict=True):
            new = range(len(text) - 1 if goes_on else 0, len(text))
            spans.append(SequenceSpan(len(tokens), len(new), len(text), ((place * PAGES_EACH, PAGES_EACH),)))
            tokens += text[new.start :]
            positions += new
            slots += (place * PAGES_EACH * PAGE + position for position in new)
        rows = torch.arange(len(tokens))
        batch = Batch(torch.tensor(tokens), torch.tensor(positions), torch.tensor(slots), tuple(spans), rows)
        exchange = OneRank(self._config.num_local_experts)
        logits_RV = self._model.logits(self._model.forward(batch, self._kv, exchange))
        return list(torch.split(logits_RV, [span.length for span in spans]))

    def after(self, texts: Sequence[list[int]]) -> Iterator[Tensor]:
        """The same for any number of texts, one after another."""
        for start in range(0, len(texts), GROUP):
            group = texts[start : start + GROUP]
            yield from self.logits(group, range(len(group)))

    def greedy(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Answers, ended or as long as an answer may be."""
        texts = [list(prompt) for prompt in prompts]
        for start in range(0, len(texts), GROUP):
            group = texts[start : start + GROUP]
            open_places = list(range(len(group)))
            rows = self.logits(group, open_places)
            for _ in range(LONGEST_ANSWER):
                for place, logits_RV in zip(open_places, rows, strict=True):
                    group[place].append(int(logits_RV[-1].argmax()))
                open_places = [place for place in open_places if group[place][-1] != EOS]
                if not open_places:
                    break
                rows = self.logits([group[place] for place in open_places], open_places, goes_on=True)
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@dataclass(frozen=True)
class Score:
    perplexity: float
    exact: float
    tokens_agree: float
    answers_agree: float


def score(model: Model, questions: Sequence[Question], greedy: Sequence[list[int]]) -> Score:
    losses, exact, same = [], [], []
    after = model.after([question.prompt + question.answer[:-1] for question in questions])
    for question, logits_TV in zip(questions, after, strict=True):
        answer_RV, target_R = logits_TV[len(question.prompt) - 1 :], torch.tensor(question.answer)
        losses.append(functional.cross_entropy(answer_RV, target_R, reduction="none"))
        exact.append(bool((answer_RV.argmax(-1) == target_R).all()))
    after = model.after([question.prompt + answer[:-1] for question, answer in zip(questions, greedy, strict=True)])
    for question, answer, logits_TV in zip(questions, greedy, after, strict=True):
        same.append(logits_TV[len(question.prompt) - 1 :].argmax(-1) == torch.tensor(answer))
    return Score(
        math.exp(float(torch.cat(losses).mean())),
        sum(exact) / len(exact),
        float(torch.cat(same).float().mean()),
        sum(bool(each.all()) for each in same) / len(same),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What each quantisation costs the demo model.")
    parser.add_argument("--questions", type=int, default=1600, help="how many of 1600 (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    directory = Path(str(importlib.resources.files("model"))) / "demo"
    encoder = Encoder((directory / "tokenizer.model").read_bytes())
    conversations = held_out(Corpus(), seed=0)
    every = max(1, len(conversations) // options.questions)
    questions = [
        Question(encoder.prompt(conversation), encoder.answer(conversation.turns[-1].answer))
        for conversation in conversations[::every]
    ]
    greedy: list[list[int]] | None = None
    print(f"{len(questions)} questions\n")
    print("| | bits a weight | weights, MB | perplexity | exactly right | same tokens | same answers |")
    print("|---|---|---|---|---|---|---|")
    for mode in MODES:
        model = Model(directory, mode)
        greedy = greedy or model.greedy([question.prompt for question in questions])
        found = score(model, questions, greedy)
        print(
            f"| {mode or 'none'} | {model.bits:.2f} | {model.weight_bytes / 1e6:.1f} | {found.perplexity:.4f} "
            f"| {found.exact:.1%} | {found.tokens_agree:.2%} | {found.answers_agree:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
