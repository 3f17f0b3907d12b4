"""What a request may change in its logits before a token is drawn: bans, biases and penalties, in this order.

    allowed_ids, bad_words, min_tokens   some logits become -inf
    bias                                 added
    repetition_penalty                   tokens of prompt and answer: positive logits divided, negative multiplied
    frequency, presence                  tokens of the answer: times their count, and once

Bans never leave a row with nothing to draw: where allowed_ids names only tokens that are banned, allowed_ids wins.

R rows, V vocabulary. Pure functions of logits and of a History that is rebuilt by replaying a sequence's ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.to_device import numbers, to_device


@dataclass(frozen=True, slots=True)
class LogitRules:
    """Of one request. Ids are below V: the caller checked them."""

    allowed_ids: tuple[int, ...] | None = None  # never empty
    bad_words: tuple[
        tuple[int, ...], ...
    ] = ()  # as token ids, none empty: the last one is kept from following the rest
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()  # what ends an answer, banned until there are min_tokens
    bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True)
class History:
    """The tokens of one sequence as rules look at them, on the host. append() is the only thing that changes one."""

    generated: list[int]
    prompt_V: Tensor  # bool: in the prompt
    count_V: Tensor  # int32: how often generated

    @classmethod
    def start(cls, prompt_ids: Sequence[int], vocab_size: int) -> History:
        prompt_V = torch.zeros(vocab_size, dtype=torch.bool)
        prompt_V[torch.tensor(prompt_ids, dtype=torch.int64)] = True
        return cls([], prompt_V, torch.zeros(vocab_size, dtype=torch.int32))

    def append(self, token_id: int) -> None:
        self.generated.append(token_id)
        self.count_V[token_id] += 1


def apply_rules(logits_RV: Tensor, rules: Sequence[LogitRules], histories: Sequence[History]) -> Tensor:
    """The logits to sample from, in float32 if a rule changes any. The given ones stay, for log-probabilities."""
    assert logits_RV.shape[0] == len(rules) == len(histories), (logits_RV.shape, len(rules), len(histories))
    if all(rule == LogitRules() for rule in rules):
        return logits_RV
    out_RV = logits_RV.to(torch.float32, copy=True)
    _apply_bans(out_RV, rules, histories)
    _add_bias(out_RV, rules)
    _apply_penalties(out_RV, rules, histories)
    return out_RV


def banned_ids(rule: LogitRules, generated: Sequence[int]) -> set[int]:
    """What bad_words and min_tokens forbid next."""
    banned = {
        word[-1]
        for word in rule.bad_words
        if len(word) <= len(generated) + 1 and tuple(generated[len(generated) - len(word) + 1 :]) == word[:-1]
    }
    if len(generated) < rule.min_tokens:
        banned.update(rule.stop_ids)
    return banned


def _apply_bans(logits_RV: Tensor, rules: Sequence[LogitRules], histories: Sequence[History]) -> None:
    rows: list[int] = []
    ids: list[int] = []
    for row, (rule, history) in enumerate(zip(rules, histories, strict=True)):
        banned = banned_ids(rule, history.generated)
        if rule.allowed_ids is not None:
            kept = _index([i for i in rule.allowed_ids if i not in banned] or rule.allowed_ids, logits_RV)
            kept_logits = logits_RV[row, kept]
            logits_RV[row] = -torch.inf
            logits_RV[row, kept] = kept_logits
        elif banned:
            rows += [row] * len(banned)
            ids += banned
    if rows:
        logits_RV[_index(rows, logits_RV), _index(ids, logits_RV)] = -torch.inf


def _add_bias(logits_RV: Tensor, rules: Sequence[LogitRules]) -> None:
    entries = [(row, token_id, value) for row, rule in enumerate(rules) for token_id, value in rule.bias]
    if entries:
        rows, ids, values = zip(*entries, strict=True)
        where = (_index(rows, logits_RV), _index(ids, logits_RV))
        logits_RV.index_put_(where, _column(values, logits_RV)[:, 0], accumulate=True)


def _apply_penalties(logits_RV: Tensor, rules: Sequence[LogitRules], histories: Sequence[History]) -> None:
    penalized = [row for row, rule in enumerate(rules) if rule.penalizes]
    if not penalized:
        return
    index = _index(penalized, logits_RV)
    chosen = [rules[row] for row in penalized]
    repetition_R1 = _column([rule.repetition_penalty for rule in chosen], logits_RV)
    frequency_R1 = _column([rule.frequency_penalty for rule in chosen], logits_RV)
    presence_R1 = _column([rule.presence_penalty for rule in chosen], logits_RV)
    count_RV = to_device(torch.stack([histories[row].count_V for row in penalized]), logits_RV.device)
    prompt_RV = to_device(torch.stack([histories[row].prompt_V for row in penalized]), logits_RV.device)
    some_RV = logits_RV[index]
    repeated_RV = torch.where(some_RV > 0, some_RV / repetition_R1, some_RV * repetition_R1)
    some_RV = torch.where(prompt_RV | (count_RV > 0), repeated_RV, some_RV)
    logits_RV[index] = some_RV - frequency_R1 * count_RV - presence_R1 * (count_RV > 0)


def _index(ids: Sequence[int], like: Tensor) -> Tensor:
    return numbers(ids, torch.int64, like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return numbers(values, torch.float32, like.device)[:, None]
