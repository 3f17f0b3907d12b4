"""The vectorised sampler against a plain one, row by row; and what a seeded draw may and may not depend on."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

import model.sampler
from model.sampler import SamplingRow, cutoff, noise, sample

MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def plain_gumbel(seed: int, index: int, token_id: int) -> float:
    key = mix64(mix64(seed) + index)
    x = (token_id * 0x9E3779B1 + (key >> 32)) & 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x ^= key & 0xFFFFFFFF
    x = x * 0x846CA68B & 0xFFFFFFFF
    x ^= x >> 16
    uniform = ((x & 0x7FFFFFFF) + 0.5) / 2**31
    return -math.log(-math.log1p(-uniform))


def plain_kept(scaled: list[float], row: SamplingRow) -> list[int]:
    """The ids that the filters leave in."""
    kept = sorted(range(len(scaled)), key=lambda v: -scaled[v])
    if row.top_k > 0:
        kept = [v for v in kept if scaled[v] >= scaled[kept[min(row.top_k, len(kept)) - 1]]]
    if row.top_p < 1.0:
        wanted = row.top_p * sum(math.exp(scaled[v]) for v in kept)
        held = 0.0
        for last in kept:
            held += math.exp(scaled[last])
            if held >= wanted:
                break
        kept = [v for v in kept if scaled[v] >= scaled[last]]
    if row.min_p > 0.0:
        kept = [v for v in kept if math.exp(scaled[v]) >= row.min_p * (1 - 1e-6)]
    return kept


def plain_sample(logits: list[float], row: SamplingRow) -> int:
    best = max(logits)
    if row.greedy:
        return logits.index(best)
    scaled = [(logit - best) / row.temperature for logit in logits]
    kept = sorted(plain_kept(scaled, row))
    return max(kept, key=lambda v: scaled[v] + plain_gumbel(row.seed, row.index, v))


def random_row(rng: random.Random) -> SamplingRow:
    return SamplingRow(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 2.5]),
        top_k=rng.choice([0, 0, 1, 2, 7, 40, 10**6]),
        top_p=rng.choice([1.0, 1.0, 0.01, 0.5, 0.9, 0.999, 1 - 2**-53]),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
        seed=rng.choice([0, 1, -1, 2**63, rng.getrandbits(64)]),
        index=rng.randrange(1000),
    )


@pytest.mark.parametrize("vocab_size", [2, 37, 384, 3000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_equals_the_plain_sampler(vocab_size: int, spread: float, step: float) -> None:
    """Flat and peaked rows, nuclei of one and of thousands, and (with steps) many exact ties."""
    rng = random.Random(f"{vocab_size} {spread} {step}")
    generator = torch.Generator().manual_seed(vocab_size)
    rows = [random_row(rng) for _ in range(24)]
    logits_RV = torch.randn(len(rows), vocab_size, generator=generator) * spread
    if step:
        logits_RV = (logits_RV / step).round() * step
    expected = [plain_sample(logits, row) for logits, row in zip(logits_RV.double().tolist(), rows, strict=True)]
    assert sample(logits_RV, rows).tolist() == expected


def test_top_p_takes_in_nothing_that_top_k_left_out() -> None:
    """However the mass of what top_k left is rounded."""
    generator = torch.Generator().manual_seed(0)
    scaled_RV = torch.randn(200, 3000, generator=generator) * 5
    scaled_RV -= scaled_RV.amax(dim=-1, keepdim=True)
    cutoff_R = cutoff(scaled_RV, [SamplingRow(top_k=2900, top_p=1 - 2**-53)] * 200)
    assert ((scaled_RV >= cutoff_R[:, None]).sum(dim=-1) <= 2900).all()


def test_a_row_draws_the_same_in_any_batch_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.sampler, "_CPU_CHUNK", 7 * 9001)  # rows are drawn seven at a time
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    rows = [random_row(rng) for _ in range(40)]
    logits_RV = torch.randn(len(rows), 9001, generator=generator) * 3
    together = sample(logits_RV, rows)
    alone = torch.cat([sample(logits_RV[r : r + 1], rows[r : r + 1]) for r in range(len(rows))])
    assert together.tolist() == alone.tolist()
    order = rng.sample(range(len(rows)), len(rows))
    shuffled = sample(logits_RV[torch.tensor(order)], [rows[r] for r in order])
    assert shuffled.tolist() == together[torch.tensor(order)].tolist()
    torch.set_num_threads(2)  # for a few rows: threads that meet on a busy machine wait for each other
    assert sample(logits_RV[:7], rows[:7]).tolist() == together[:7].tolist()


def test_rounding_changes_few_draws() -> None:
    """Another topology adds up in another order: the draw must not hang on the last bits of all other tokens."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(400, 2000, generator=generator)
    rows = [SamplingRow(seed=seed) for seed in range(400)]
    rounded_RV = logits_RV * (1 + 1e-6 * torch.randn(logits_RV.shape, generator=generator))
    assert sample(logits_RV, rows).tolist() == sample(rounded_RV, rows).tolist()


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["seed", "index"])
def test_draws_follow_the_softmax(vary: str) -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -2.0, 1.5, 0.0])
    draws = 8_000
    rows = [
        SamplingRow(temperature=1.3, seed=7, **{vary: i}) if vary == "index" else SamplingRow(1.3, seed=i)
        for i in range(draws)
    ]
    ids = sample(logits_V.expand(draws, -1), rows)
    probability_V = (logits_V / 1.3).softmax(dim=0)
    # 7 degrees of freedom: above 24.3 once in a thousand sets of seeds, and this is one set.
    assert chi_square(torch.bincount(ids, minlength=8), probability_V * draws) < 24.3
    # Neighbours in seed or index know nothing of each other: 63 degrees of freedom, 103.4 once in a thousand.
    pairs = torch.bincount(ids[:-1] * 8 + ids[1:], minlength=64)
    assert chi_square(pairs, torch.outer(probability_V, probability_V).flatten() * (draws - 1)) < 103.4


def test_unlikely_tokens_among_many_are_drawn_as_often_as_they_should() -> None:
    """A vocabulary of equals: every id is as likely, the first and the last too."""
    draws, vocab_size = 480, 32000
    ids = torch.cat(
        [
            sample(torch.zeros(240, vocab_size), [SamplingRow(seed=s + i) for i in range(240)])
            for s in range(0, draws, 240)
        ]
    )
    counts = torch.bincount(ids // (vocab_size // 16), minlength=16)
    assert chi_square(counts, torch.full((16,), draws / 16)) < 37.7  # 15 degrees of freedom, once in a thousand


def test_noise_is_finite_at_both_ends() -> None:
    ends = noise(torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert ends.isfinite().all()
    assert ends.max() == ends[0] == ends[4] > 22
    assert ends.min() == ends[3] == ends[2] < -2.8


def test_a_batch_of_greedy_rows_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Tensor:
        raise AssertionError("drawn")

    monkeypatch.setattr(model.sampler, "gumbel", fail)
    logits_RV = torch.tensor([[1.0, 3.0, 3.0], [0.0, -1.0, 0.0]])
    assert sample(logits_RV, [SamplingRow(temperature=0.0), SamplingRow(top_k=1)]).tolist() == [1, 0]
    with pytest.raises(AssertionError, match="drawn"):
        sample(logits_RV, [SamplingRow(temperature=0.0), SamplingRow()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [2e-5, 1.0, 1e4])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_banned_tokens_are_never_drawn(dtype: torch.dtype, temperature: float, filters: dict[str, float]) -> None:
    logits_V = torch.tensor([-torch.inf, 9.0, -torch.inf, 8.0, 7.0, -torch.inf], dtype=dtype)
    rows = [SamplingRow(temperature=temperature, seed=seed, **filters) for seed in range(200)]  # type: ignore[arg-type]
    drawn = set(sample(logits_V.expand(200, -1), rows).tolist())
    assert drawn <= {1, 3, 4}
    assert (drawn == {1}) == (temperature < 1)


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 10), []).shape == (0,)
