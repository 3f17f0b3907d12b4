"""Sampling on the device: the same filters and the same noise as on a CPU."""

from __future__ import annotations

import random

import torch

from model.logit_rules import History, LogitRules, apply_rules
from model.sampler import SamplingRow, cutoff, gumbel, sample

V = 32000


def rows(count: int) -> list[SamplingRow]:
    rng = random.Random(count)
    return [
        SamplingRow(
            temperature=rng.choice([0.0, 0.5, 1.0]),
            top_k=rng.choice([0, 0, 1, 50]),
            top_p=rng.choice([1.0, 0.9, 0.3]),
            min_p=rng.choice([0.0, 0.05]),
            seed=rng.getrandbits(64),
            index=rng.randrange(1000),
        )
        for _ in range(count)
    ]


def test_noise_is_that_of_a_cpu(device: torch.device) -> None:
    some = rows(8)
    torch.testing.assert_close(
        gumbel(some, V, device).cpu(), gumbel(some, V, torch.device("cpu")), rtol=1e-4, atol=1e-4
    )


def test_filters_are_those_of_a_cpu(device: torch.device) -> None:
    some = rows(64)
    scaled_RV = torch.randn(64, V, generator=torch.Generator().manual_seed(0)) * 3
    scaled_RV -= scaled_RV.amax(-1, keepdim=True)
    torch.testing.assert_close(cutoff(scaled_RV.to(device), some).cpu(), cutoff(scaled_RV, some), rtol=1e-4, atol=1e-4)


def test_tokens_are_those_of_a_cpu_but_for_near_ties(device: torch.device) -> None:
    some = rows(256)
    logits_RV = torch.randn(256, V, generator=torch.Generator().manual_seed(1)) * 3
    same = (sample(logits_RV.to(device), some).cpu() == sample(logits_RV, some)).float().mean()
    assert same > 0.98


def test_rules_are_those_of_a_cpu(device: torch.device) -> None:
    rules = [
        LogitRules(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2),
        LogitRules(bias=((5, -100.0),), bad_words=((7,),)),
        LogitRules(allowed_ids=(3, 4)),
    ]
    histories = [History.start([1, 2, 3], V) for _ in rules]
    for history in histories:
        history.append(9)
    logits_RV = torch.randn(3, V, generator=torch.Generator().manual_seed(2))
    on_device = apply_rules(logits_RV.to(device), rules, histories).cpu()
    torch.testing.assert_close(on_device, apply_rules(logits_RV, rules, histories))
