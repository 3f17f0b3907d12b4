"""What the demo model can do, on questions that training never saw.

An answer counts as right when greedy decoding gives exactly the expected text. That is so when the expected token
has the highest logit at every position of the answer, so one forward pass over question and answer decides it;
only wrong answers are generated token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from model.demo.corpus.conversation import HELD_OUT_SYSTEMS, Conversation, Corpus, seeded
from model.demo.corpus.turns import Kind, Turn
from model.demo.data import EOS, LONGEST, Encoder, Text, long_text, pack
from model.demo.network import Network

KINDS: tuple[Kind, ...] = ("fact", "comparison", "chat", "unknown", "sum", "story", "name", "repeat", "visitor")
PER_KIND = 200
GROUP = 32  # texts per forward pass
MOST_GENERATED = 40  # wrong answers that are generated, to see what they say and whether they end
LONGEST_ANSWER = 140
LONG_CONVERSATIONS = 12
STRETCH = 512  # tokens of a long conversation that are counted together
SAMPLES = (
    "What is mixtral-serve?",
    "how does a mixture of experts work",
    "What happens to my stream when a GPU worker crashes?",
    "Tell me a story about a fox named Quorix who finds a bell.",
    "what is 38 + 47?",
    "Who was the first woman in space?",
)


@dataclass(slots=True)
class Report:
    """Filled by evaluate()."""

    loss: float = 0.0
    right: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    generated: int = 0  # answers known token by token: all right ones, some wrong ones
    ended: int = 0  # of these, the ones that end by themselves
    gaps: list[float] = field(default_factory=list)
    share_LE: list[list[float]] = field(default_factory=list)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)  # question, expected, given
    samples: list[tuple[str, str]] = field(default_factory=list)
    stretches: list[list[bool]] = field(default_factory=list)  # of long conversations: which answers were right

    def lines(self) -> Iterator[str]:
        yield f"held-out loss {self.loss:.4f}"
        for kind, asked in self.asked.items():
            yield f"{kind:12} {self.right[kind]:4} of {asked} exactly right"
        yield f"ended by </s>: {self.ended} of {self.generated}"
        gaps = torch.tensor(self.gaps)
        yield (
            f"logit gap of first to second: minimum {gaps.min():.3f}, "
            f"1st percentile {gaps.quantile(0.01):.2f}, median {gaps.median():.1f}"
        )
        for layer, shares in enumerate(self.share_LE):
            even = 1 / len(shares)
            yield f"layer {layer}: share of each expert {min(shares):.3f} to {max(shares):.3f} (even: {even:.3f})"
        for number, right in enumerate(self.stretches):
            start = number * STRETCH
            yield f"long conversations, tokens {start} to {start + STRETCH}: {sum(right)} of {len(right)} right"
        for question, answer in self.samples:
            yield f"  > {question}\n    {answer}"
        for question, expected, given in self.wrong:
            yield f"  wrong: {question}\n    wanted {expected}\n    got    {given}"


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: list[int]  # without </s>
    gaps: list[float]
    ended: bool


def top_gap(logits_NV: Tensor) -> list[float]:
    first, second = logits_NV.topk(2, dim=-1).values.unbind(-1)
    return [float(gap) for gap in first - second]


@torch.inference_mode()
def greedy(network: Network, prompts: list[list[int]]) -> list[Answer]:
    """Greedy answers, all prompts together; every step computes the whole text anew."""
    answers: list[Answer] = [Answer([], [], False) for _ in prompts]
    for _ in range(LONGEST_ANSWER):
        open_answers = [number for number, answer in enumerate(answers) if not answer.ended]
        if not open_answers:
            break
        texts = [prompts[number] + answers[number].token_ids for number in open_answers]
        # The last token is only there to be predicted.
        rows = [[Text([*ids, EOS], [False] * len(ids) + [True])] for ids in texts]
        batch = pack(rows, max(len(ids) for ids in texts) + 1)
        logits_NV = network(batch.token_BL, batch.position_BL, batch.text_BL, batch.wanted_N).logits_NV
        gaps = top_gap(logits_NV)
        for row, number in enumerate(open_answers):
            token, before = int(logits_NV[row].argmax()), answers[number]
            ended = token == EOS
            answers[number] = Answer(before.token_ids + [token] * (not ended), [*before.gaps, gaps[row]], ended)
    return answers


def held_out(corpus: Corpus, seed: int) -> list[Conversation]:
    rng = seeded("evaluation", seed)
    conversations = []
    for kind in KINDS:
        for _ in range(PER_KIND):
            system = rng.choice(HELD_OUT_SYSTEMS) if rng.random() < 0.1 else ""
            conversations.append(Conversation((corpus.held_out_turn(rng, kind),), system))
    return conversations


@torch.inference_mode()
def evaluate(network: Network, encoder: Encoder, corpus: Corpus, seed: int) -> Report:
    report = Report()
    conversations = held_out(corpus, seed)
    losses, shares, missed = [], [], []
    for start in range(0, len(conversations), GROUP):
        group = conversations[start : start + GROUP]
        texts = [encoder.text(conversation) for conversation in group]
        batch = pack([[text] for text in texts], max(len(text.token_ids) for text in texts))
        output = network(batch.token_BL, batch.position_BL, batch.text_BL, batch.wanted_N)
        losses.append(functional.cross_entropy(output.logits_NV, batch.target_N, reduction="none"))
        shares.append(output.share_LE)
        row_N = batch.wanted_N // batch.token_BL.shape[1]
        hit_N = output.logits_NV.argmax(dim=-1) == batch.target_N
        for row, conversation in enumerate(group):
            kind, right = conversation.turns[0].kind, bool(hit_N[row_N == row].all())
            report.asked[kind] = report.asked.get(kind, 0) + 1
            report.right[kind] = report.right.get(kind, 0) + right
            if right:
                report.ended += 1
                report.gaps += top_gap(output.logits_NV[row_N == row])
            else:
                missed.append(conversation)
    report.loss = float(torch.cat(losses).mean())
    report.share_LE = torch.stack(shares).mean(dim=0).tolist()
    missed = seeded("misses", seed).sample(missed, min(len(missed), MOST_GENERATED))
    report.generated = sum(report.right.values()) + len(missed)
    for conversation, answer in zip(missed, greedy(network, [encoder.prompt(c) for c in missed]), strict=True):
        turn = conversation.turns[0]
        report.wrong.append((turn.question, turn.answer, encoder.decode(answer.token_ids)))
        report.ended += answer.ended
        report.gaps += answer.gaps
    report.stretches = long_conversations(network, encoder, corpus, seed)
    prompts = [encoder.prompt(ask(question)) for question in SAMPLES]
    for question, answer in zip(SAMPLES, greedy(network, prompts), strict=True):
        report.samples.append((question, encoder.decode(answer.token_ids)))
    return report


@torch.inference_mode()
def long_conversations(network: Network, encoder: Encoder, corpus: Corpus, seed: int) -> list[list[bool]]:
    """For each stretch of long conversations, phrased as in training, which answers were exactly right."""
    rng = seeded("long", seed)
    _, length = LONGEST
    stretches: list[list[bool]] = [[] for _ in range(length // STRETCH)]
    for _ in range(LONG_CONVERSATIONS):
        batch = pack([[long_text(corpus, encoder, rng, length)]], length)
        logits_NV = network(batch.token_BL, batch.position_BL, batch.text_BL, batch.wanted_N).logits_NV
        hits = (logits_NV.argmax(dim=-1) == batch.target_N).tolist()
        positions = batch.wanted_N.tolist()
        begins = [n for n in range(len(positions)) if n == 0 or positions[n] != positions[n - 1] + 1]
        for begin, end in pairwise([*begins, len(positions)]):
            stretches[positions[begin] // STRETCH].append(all(hits[begin:end]))
    return stretches


def ask(question: str) -> Conversation:
    return Conversation((Turn("chat", question, ""),))
