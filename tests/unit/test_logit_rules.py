"""Bans, biases and penalties against a plain version that handles one logit of one request at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch

from model.logit_rules import History, LogitRules, apply_rules, banned_ids

VOCAB = 24


def plain_rules(logits: list[float], rule: LogitRules, prompt: list[int], generated: list[int]) -> list[float]:
    banned = set()
    for word in rule.bad_words:
        *beginning, last = word
        if generated[len(generated) - len(beginning) :] == beginning and len(beginning) <= len(generated):
            banned.add(last)
    if len(generated) < rule.min_tokens:
        banned |= set(rule.stop_ids)
    allowed = set(range(len(logits))) if rule.allowed_ids is None else set(rule.allowed_ids)
    out = []
    for v, logit in enumerate(logits):
        if v not in (allowed - banned or allowed):
            logit = -math.inf
        logit += sum(value for token_id, value in rule.bias if token_id == v)
        if v in prompt or v in generated:
            logit = logit / rule.repetition_penalty if logit > 0 else logit * rule.repetition_penalty
        logit -= rule.frequency_penalty * generated.count(v) + rule.presence_penalty * (v in generated)
        out.append(logit)
    return out


def random_rule(rng: random.Random) -> LogitRules:
    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(VOCAB), k=rng.randint(1, most)))

    return LogitRules(
        allowed_ids=rng.choice([None, None, ids(5)]),
        bad_words=tuple(ids(3) for _ in range(rng.randrange(4))),
        min_tokens=rng.choice([0, 3, 100]),
        stop_ids=ids(3),
        bias=tuple((i, rng.uniform(-9, 9)) for i in ids(4)) if rng.random() < 0.5 else (),
        repetition_penalty=rng.choice([1.0, 1.3, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.7, -2.0]),
        presence_penalty=rng.choice([0.0, 1.5]),
    )


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_plain_version(seed: int) -> None:
    rng = random.Random(seed)
    rules = [rng.choice([random_rule(rng), LogitRules()]) for _ in range(6)]
    prompts = [rng.choices(range(VOCAB), k=rng.randrange(1, 6)) for _ in rules]
    answers = [rng.choices(range(4), k=rng.randrange(6)) for _ in rules]  # few ids, so that bad words match
    histories = [History.start(prompt, VOCAB) for prompt in prompts]
    for history, answer in zip(histories, answers, strict=True):
        for token_id in answer:
            history.append(token_id)
    logits_RV = torch.randn(len(rules), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    before = logits_RV.clone()
    expected = [plain_rules(*row) for row in zip(logits_RV.tolist(), rules, prompts, answers, strict=True)]
    torch.testing.assert_close(apply_rules(logits_RV, rules, histories), torch.tensor(expected))
    assert torch.equal(logits_RV, before)


def test_requests_without_rules_cost_nothing() -> None:
    logits_RV = torch.zeros(2, VOCAB)
    assert apply_rules(logits_RV, [LogitRules()] * 2, [History.start([1], VOCAB)] * 2) is logits_RV


def test_a_bad_word_is_stopped_at_its_last_token_only() -> None:
    rule = LogitRules(bad_words=((5,), (1, 2, 3)))
    assert banned_ids(rule, []) == {5}
    assert banned_ids(rule, [2]) == {5}
    assert banned_ids(rule, [1, 2]) == {5, 3}
    assert banned_ids(rule, [0, 1, 2]) == {5, 3}
    assert banned_ids(rule, [1, 2, 0]) == {5}


def test_stop_ids_are_banned_until_there_are_enough_tokens() -> None:
    rule = LogitRules(min_tokens=2, stop_ids=(2, 7))
    assert [banned_ids(rule, [9] * n) for n in range(4)] == [{2, 7}, {2, 7}, set(), set()]


def test_something_is_always_left_to_draw() -> None:
    rule = LogitRules(allowed_ids=(2,), min_tokens=5, stop_ids=(2,))
    out_RV = apply_rules(torch.zeros(1, VOCAB), [rule], [History.start([], VOCAB)])
    assert out_RV.argmax().item() == 2
    assert out_RV.isfinite().sum() == 1


def test_half_precision_is_computed_in_float32() -> None:
    rule = LogitRules(bias=((3, 0.001),))
    logits_RV = torch.full((1, VOCAB), 8.0, dtype=torch.bfloat16)
    assert apply_rules(logits_RV, [rule], [History.start([1], VOCAB)]).argmax().item() == 3
