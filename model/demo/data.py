"""From conversations to batches: the tokenizer, the chat format, and several texts packed into each row.

    row      <s>[INST] q [/INST] a</s><s>[INST] q [/INST] a</s>   padding
    text      0  0     0 0       0 0   1  1     1 1       1 1     2
    wanted                       x x                      x x             the positions whose next token is an answer's

Knows nothing of the network. Shapes: B rows, L tokens per row, N wanted positions.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

from model.demo.corpus.conversation import Conversation, Corpus, seeded

VOCAB_SIZE = 1408
UNKNOWN, BOS, EOS = 0, 1, 2
TOKENIZER_TEXTS = 40_000
POOL_SIZE = 64  # texts to choose from when a row is filled
# Rows and tokens per row. Most steps are short; one in 16 is long, so that the model holds up in long conversations.
SHORT, LONG, LONGEST = (12, 192), (2, 1024), (1, 2048)
TOKENS_PER_TURN = 40  # fewer than a turn has on average: enough turns to fill a long row


def train_tokenizer(corpus: Corpus, seed: int) -> bytes:
    """A SentencePiece model that puts no space before a text: what the chat template writes is what is encoded."""
    rng = seeded("tokenizer", seed)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for _ in range(TOKENIZER_TEXTS) for line in lines(corpus.conversation(rng))),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=UNKNOWN,
        bos_id=BOS,
        eos_id=EOS,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def lines(conversation: Conversation) -> Iterator[str]:
    for turn in conversation.turns:
        yield f"{chat_question(turn.question, '')} {turn.answer}"


def chat_question(question: str, system: str) -> str:
    """One user message as the chat template writes it."""
    return f"[INST] {system}\n\n{question} [/INST]" if system else f"[INST] {question} [/INST]"


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids and, for each, whether it belongs to an answer."""

    token_ids: list[int]
    is_answer: list[bool]


class Encoder:
    """Conversations to token ids."""

    def __init__(self, tokenizer: bytes) -> None:
        self.processor = SentencePieceProcessor(model_proto=tokenizer)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Everything before the last answer."""
        text = self.text(conversation)
        answer = self.answer(conversation.turns[-1].answer)
        return text.token_ids[: -len(answer)]

    def answer(self, answer: str) -> list[int]:
        return [*self.processor.encode(f" {answer}"), EOS]

    def text(self, conversation: Conversation) -> Text:
        token_ids, is_answer = [BOS], [False]
        for number, turn in enumerate(conversation.turns):
            raw = turn.kind == "completion"
            question = turn.question if raw else chat_question(turn.question, "" if number else conversation.system)
            for ids, answer in ((self.processor.encode(question), False), (self.answer(turn.answer), True)):
                token_ids += ids
                is_answer += [answer] * len(ids)
        return Text(token_ids, is_answer)

    def decode(self, token_ids: list[int]) -> str:
        return str(self.processor.decode(token_ids)).strip()


@dataclass(frozen=True, slots=True)
class Batch:
    token_BL: Tensor
    position_BL: Tensor
    text_BL: Tensor  # the number of the text each token belongs to
    wanted_N: Tensor  # flat positions before a token of an answer
    target_N: Tensor  # that token


def pack(rows: list[list[Text]], length: int) -> Batch:
    token_BL = torch.full((len(rows), length), UNKNOWN)
    position_BL = torch.zeros(len(rows), length, dtype=torch.long)
    text_BL = torch.full((len(rows), length), max(len(row) for row in rows))
    wanted, target = [], []
    for b, row in enumerate(rows):
        start = 0
        for number, text in enumerate(row):
            end = start + len(text.token_ids)
            token_BL[b, start:end] = torch.tensor(text.token_ids)
            position_BL[b, start:end] = torch.arange(end - start)
            text_BL[b, start:end] = number
            for index in range(1, len(text.token_ids)):
                if text.is_answer[index]:
                    wanted.append(b * length + start + index - 1)
                    target.append(text.token_ids[index])
            start = end
    return Batch(token_BL, position_BL, text_BL, torch.tensor(wanted), torch.tensor(target))


def fill_row(pool: list[Text], length: int) -> list[Text]:
    """Take texts out of the pool, oldest first, as long as one still fits."""
    row: list[Text] = []
    room = length
    while (found := next((text for text in pool if len(text.token_ids) <= room), None)) is not None:
        pool.remove(found)
        row.append(found)
        room -= len(found.token_ids)
    return row


def batches(corpora: Iterable[Corpus], encoder: Encoder, seed: int) -> Iterator[Batch]:
    """One batch from each corpus of a training run, the same for the same seed."""
    rng = seeded("training", seed)
    pool: list[Text] = []
    for step, corpus in enumerate(corpora):
        if step % 16 != 15:
            num_rows, length = SHORT
            rows = []
            for _ in range(num_rows):
                while len(pool) < POOL_SIZE:
                    text = encoder.text(corpus.conversation(rng))
                    if len(text.token_ids) <= length:  # the others are few, and long rows have their like
                        pool.append(text)
                rows.append(fill_row(pool, length))
        else:
            num_rows, length = LONGEST if step % 32 == 31 else LONG
            rows = [[long_text(corpus, encoder, rng, length)] for _ in range(num_rows)]
        yield pack(rows, length)


def long_text(corpus: Corpus, encoder: Encoder, rng: Random, length: int) -> Text:
    text = encoder.text(corpus.conversation(rng, turns=length // TOKENS_PER_TURN))
    return Text(text.token_ids[:length], text.is_answer[:length])
