"""What the hidden states of a step become: tokens, log-probabilities of a prompt, vectors of texts.

The first rank of a tensor group chooses tokens and tells the others. What was sampled stays on the device, in the seat
of its sequence, where the next step finds it before anybody else knows it.

R rows whose hidden states are wanted.  M of these, that are sampled from.  L rows of one text.  D model width.
V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.messages import TokenLogprob
from cluster.rank_state import StepInput, Wanted
from cluster.sampling import choose, token_logprobs
from cluster.step_input import StepTensors
from model.comm import Comm
from model.mixtral import Mixtral
from model.stages import Stages

HEAD_ROWS = 256  # rows of a prompt whose logits are in memory at once


class Readout:
    def __init__(
        self, model: Mixtral, tensor: Comm, last_ids: Tensor, stages: Stages, *, samples: bool, classifies: bool
    ) -> None:
        """`last_ids`: one for each seat. `classifies`: vectors are scores of labels."""
        self._model = model
        self._tensor = tensor
        self._last_ids = last_ids
        self._stages = stages
        self._samples = samples
        self._classifies = classifies

    def sample(
        self, step: StepInput, tensors: StepTensors, hidden_RD: Tensor
    ) -> tuple[Tensor, dict[int, TokenLogprob]]:
        """The next token of each sequence that is sampled, (M,), and what the model thought of those that ask."""
        logprobs: dict[int, TokenLogprob] = {}
        if not step.sampled:
            return tensors.seat, logprobs
        hidden_MD = hidden_RD if len(hidden_RD) == len(step.sampled) else hidden_RD.index_select(0, tensors.sampled_row)
        logits_MV = self._model.logits(hidden_MD)
        self._stages.start("sample")
        if self._samples:
            sequences = [state.sampled for state in step.sampled if state.sampled is not None]
            ids_M = choose(logits_MV, sequences)
            top = {m: n for m, s in enumerate(sequences) if (n := s.sampling.logprobs) is not None}
            if top:
                found = token_logprobs(logits_MV[list(top)], ids_M[list(top)], list(top.values()))
                logprobs = {step.sampled[m].start.seq: logprob for m, logprob in zip(top, found, strict=True)}
        else:
            ids_M = torch.empty_like(tensors.seat)
        if self._tensor.size > 1:
            self._stages.start("exchange")
            ids_M = self._tensor.broadcast(ids_M, 0)
        self._last_ids.index_copy_(0, tensors.seat, ids_M)
        return ids_M, logprobs

    def judge(self, step: StepInput, hidden_RD: Tensor) -> dict[int, tuple[TokenLogprob, ...]]:
        """What the model thought of prompts, as far as they are in the step. On all ranks of a group, or on none."""
        return {wanted.state.start.seq: self._judge(wanted, hidden_RD) for wanted in step.judged}

    def _judge(self, wanted: Wanted, hidden_RD: Tensor) -> tuple[TokenLogprob, ...]:
        """Of the tokens that follow the wanted rows."""
        sampling = wanted.state.start.sampling
        assert sampling is not None
        assert sampling.prompt_logprobs is not None
        found: list[TokenLogprob] = []
        for first in range(0, len(wanted.targets), HEAD_ROWS):
            targets = wanted.targets[first : first + HEAD_ROWS]
            row = wanted.rows[0] + first
            logits_RV = self._model.logits(hidden_RD[row : row + len(targets)])
            if self._samples:
                targets_R = torch.tensor(targets, device=hidden_RD.device)
                found += token_logprobs(logits_RV, targets_R, [sampling.prompt_logprobs] * len(targets))
        return tuple(found)

    def pool(self, step: StepInput, hidden_RD: Tensor) -> dict[int, tuple[tuple[float, ...], ...]]:
        """Add the wanted rows to their texts; the vectors of the texts that end."""
        pooled = {}
        for wanted in step.pooled:
            state = wanted.state
            assert state.pool is not None
            rows_LD = hidden_RD[wanted.rows[0] : wanted.rows[-1] + 1]
            state.pool = state.pool.add(self._model.logits(rows_LD) if self._classifies else rows_LD)
            if wanted.ends:
                pooled[state.start.seq] = tuple(map(tuple, state.pool.result().tolist()))
        return pooled
