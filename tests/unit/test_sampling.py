from __future__ import annotations

import torch

from cluster.messages import Grammar, SamplingParams, SequenceStart
from cluster.sampling import Sampled, choose, logit_rules, token_logprobs
from model.errors import ModelError
from model.grammar import Matcher

V = 12
EOS = (2,)


class OnlyCounting:
    """A matcher that allows n after n - 1, and fails on 9."""

    def __init__(self) -> None:
        self.next = 3

    def replay(self, ids: list[int]) -> None:
        for token_id in ids:
            self.accept(token_id)

    def accept(self, token_id: int) -> None:
        if token_id == 9:
            raise ModelError("9 is not allowed")
        assert token_id == self.next
        self.next += 1

    def mask(self) -> bytes:
        return (1 << self.next).to_bytes(2, "little")


def make(grammar: Grammar) -> Matcher:
    if grammar.text == "broken":
        raise ModelError("this grammar is broken")
    return OnlyCounting()  # type: ignore[return-value]


def begin(token_ids: tuple[int, ...] = (5,), num_prompt: int = 1, **sampling: object) -> Sampled:
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "seed": 0, **sampling})  # type: ignore[arg-type]
    return Sampled.start(SequenceStart(0, token_ids, num_prompt, params), EOS, V, make)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def test_greedy_rows_take_the_best_and_remember_it() -> None:
    sequences = [begin(), begin(frequency_penalty=1.0)]
    scores = logits(2)
    kept = scores.clone()
    ids = choose(scores, sequences).tolist()
    assert ids == kept.argmax(-1).tolist()
    assert torch.equal(scores, kept), "log-probabilities are of the logits as they came"
    assert [s.num_generated for s in sequences] == [1, 1]
    assert sequences[1].history is not None
    assert sequences[1].history.generated == ids[1:]


def test_rules_touch_their_own_rows_only() -> None:
    scores = logits(3)
    best = scores.argmax(-1).tolist()
    ids = choose(scores, [begin(), begin(logit_bias=((best[1], -100.0),)), begin()]).tolist()
    assert ids[0] == best[0]
    assert ids[1] != best[1]
    assert ids[2] == best[2]


def test_a_replayed_sequence_is_where_it_was() -> None:
    sampling = {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.7, "min_tokens": 5, "frequency_penalty": 0.4}
    whole = begin(**sampling)
    ids = [int(choose(logits(1, step), [whole])[0]) for step in range(6)]
    for known in range(6):
        again = begin((5, *ids[:known]), 1, **sampling)
        assert [int(choose(logits(1, step), [again])[0]) for step in range(known, 6)] == ids[known:]


def test_a_grammar_decides_and_is_replayed() -> None:
    grammar = Grammar("regex", "counting")
    sequence = begin(grammar=grammar)
    assert [int(choose(logits(1), [sequence])[0]) for _ in range(3)] == [3, 4, 5]
    assert int(choose(logits(1), [begin((5, 3, 4), 1, grammar=grammar)])[0]) == 5


def test_a_grammar_in_trouble_is_its_own_sequence_s_trouble() -> None:
    broken, fine = begin(grammar=Grammar("regex", "broken")), begin()
    scores = logits(2)
    ids = choose(scores, [broken, fine]).tolist()
    assert broken.error == "this grammar is broken"
    assert fine.error is None
    assert ids[1] == int(scores[1].argmax())
    late = begin((5, *range(3, 9)), 1, grammar=Grammar("regex", "counting"))
    choose(logits(1), [late])
    assert late.error == "9 is not allowed"


def test_what_a_grammar_allows_and_the_request_bans_ends_its_own_sequence() -> None:
    fine = begin(grammar=Grammar("regex", "counting"))
    for temperature in (0.0, 1.0):
        again = begin(grammar=Grammar("regex", "counting"), bad_words=((3,),), temperature=temperature)
        choose(logits(2), [again, fine])
        assert again.error == "every token that the grammar allows next is banned by the request"
        assert fine.error is None


def test_ends_are_banned_only_where_a_minimum_is_asked_for() -> None:
    assert logit_rules(SamplingParams(8, stop_token_ids=(4,)), EOS).stop_ids == ()
    assert logit_rules(SamplingParams(8, min_tokens=1, stop_token_ids=(4,)), EOS).stop_ids == (4, 2)
    assert logit_rules(SamplingParams(8, min_tokens=1, ignore_eos=True), EOS).stop_ids == ()


def test_logprobs_of_rows_that_want_different_numbers() -> None:
    scores = logits(3)
    ids = torch.tensor([1, 2, 3])
    found = token_logprobs(scores, ids, [0, 2, 5])
    expected = scores.log_softmax(-1)
    assert [len(f.top) for f in found] == [0, 2, 5]
    for row, one in enumerate(found):
        assert one.token_id == int(ids[row])
        assert abs(one.logprob - float(expected[row, ids[row]])) < 1e-6
        assert one.rank == 1 + int((expected[row] > expected[row, ids[row]]).sum())
        assert [i for i, _ in one.top] == expected[row].topk(len(one.top)).indices.tolist()
