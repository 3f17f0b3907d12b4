"""What a rank keeps of each sequence to choose its next token, and the choosing of a whole step.

Everything here is rebuilt from a sequence's tokens when it starts again, so preemption and recovery need no other
state. The order is fixed: rules and grammar change the logits, then one token per row is drawn; log-probabilities
are of the logits before all of that.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.messages import Grammar, SamplingParams, SequenceStart, TokenLogprob
from model.errors import ModelError
from model.grammar import Matcher, apply_grammars
from model.logit_rules import History, LogitRules, apply_rules
from model.logprobs import logprobs
from model.sampler import SamplingRow, sample
from model.to_device import numbers

MakeMatcher = Callable[[Grammar], Matcher]
PLAIN = LogitRules()


@dataclass(slots=True)
class Sampled:
    """One sequence as the sampler sees it."""

    sampling: SamplingParams
    num_generated: int
    rules: LogitRules
    history: History | None  # of sequences whose rules look at it
    matcher: Matcher | None
    error: str | None = None  # why it cannot go on

    @classmethod
    def start(cls, start: SequenceStart, eos_ids: Sequence[int], vocab_size: int, make_matcher: MakeMatcher) -> Sampled:
        sampling = start.sampling
        assert sampling is not None
        prompt, generated = start.token_ids[: start.num_prompt], start.token_ids[start.num_prompt :]
        rules = logit_rules(sampling, eos_ids)
        history, matcher, error = None, None, None
        if rules != PLAIN:
            history = History.start(prompt, vocab_size)
            for token_id in generated:
                history.append(token_id)
        if sampling.grammar is not None:
            try:
                matcher = make_matcher(sampling.grammar)
                matcher.replay(generated)
            except ModelError as failure:
                error = str(failure)
        return cls(sampling, len(generated), rules, history, matcher, error)

    def row(self) -> SamplingRow:
        params = self.sampling
        assert params.seed is not None
        return SamplingRow(
            params.temperature, params.top_k, params.top_p, params.min_p, params.seed, self.num_generated
        )

    @property
    def watches(self) -> bool:
        """It has to know what it generated; others only how much."""
        return self.history is not None or self.matcher is not None

    def accept(self, token_id: int) -> None:
        if self.history is not None:
            self.history.append(token_id)
        if self.matcher is not None and self.error is None:
            try:
                self.matcher.accept(token_id)
            except ModelError as failure:
                self.error = str(failure)


def logit_rules(sampling: SamplingParams, eos_ids: Sequence[int]) -> LogitRules:
    stop_ids = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_ids)) if sampling.min_tokens else ()
    return LogitRules(
        allowed_ids=sampling.allowed_token_ids,
        bad_words=sampling.bad_words,
        min_tokens=sampling.min_tokens,
        stop_ids=stop_ids,
        bias=sampling.logit_bias,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
    )


def choose(logits_RV: Tensor, sequences: Sequence[Sampled]) -> Tensor:
    """The next token of each sequence, (R,); the sequences take note of theirs."""
    changed = [r for r, s in enumerate(sequences) if s.rules != PLAIN or s.matcher is not None]
    if changed:
        logits_RV = logits_RV.clone()
        _apply_rules(logits_RV, sequences, [r for r in changed if sequences[r].rules != PLAIN])
        _apply_grammars(logits_RV, sequences)
    ids_R = sample(logits_RV, [s.row() for s in sequences])
    for sequence in sequences:
        sequence.num_generated += 1
    if any(sequence.watches for sequence in sequences):  # else nobody waits for the device here
        _take_note(logits_RV, ids_R, sequences)
    return ids_R


def _take_note(logits_RV: Tensor, ids_R: Tensor, sequences: Sequence[Sampled]) -> None:
    """Of what was chosen, and of whether it could be: in one copy from the device."""
    forbidden_R = logits_RV.gather(1, ids_R[:, None])[:, 0] == -torch.inf
    chosen, forbidden = torch.stack((ids_R, forbidden_R.long())).tolist()
    for sequence, token_id, nothing_left in zip(sequences, chosen, forbidden, strict=True):
        if nothing_left and sequence.matcher is not None:
            sequence.error = sequence.error or "every token that the grammar allows next is banned by the request"
        sequence.accept(token_id)


def _apply_rules(logits_RV: Tensor, sequences: Sequence[Sampled], rows: list[int]) -> None:
    if rows:
        index = numbers(rows, torch.int64, logits_RV.device)
        histories = [history for r in rows if (history := sequences[r].history) is not None]
        logits_RV[index] = apply_rules(logits_RV[index], [sequences[r].rules for r in rows], histories)


def _apply_grammars(logits_RV: Tensor, sequences: Sequence[Sampled]) -> None:
    matchers = {r: s.matcher for r, s in enumerate(sequences) if s.matcher is not None and s.error is None}
    for row, failure in apply_grammars(logits_RV, matchers).items():
        sequences[row].error = str(failure)


def token_logprobs(logits_RV: Tensor, ids_R: Tensor, top: Sequence[int]) -> list[TokenLogprob]:
    """The model's own opinion of each row's token, with the row's `top` likeliest beside it."""
    found = logprobs(logits_RV, ids_R, max(top, default=0))
    top_R = zip(found.top_ids_RN.tolist(), found.top_RN.tolist(), top, strict=True)
    best = [tuple(zip(ids[:n], values[:n], strict=True)) for ids, values, n in top_R]
    rows = zip(ids_R.tolist(), found.chosen_R.tolist(), found.rank_R.tolist(), best, strict=True)
    return [TokenLogprob(*row) for row in rows]
