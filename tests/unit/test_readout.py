from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.messages import SamplingParams, SequenceStart
from cluster.rank_state import SequenceState, StepInput, Wanted
from cluster.readout import Readout
from cluster.sampling import Sampled
from cluster.step_input import Rows, StepMemory, StepTensors
from model.comm import SoloComm
from model.pooling import Pool
from model.stages import Stages

D, V = 8, 12
GREEDY = SamplingParams(8, temperature=0.0, seed=0)


class Head:
    """A model, as far as its head goes."""

    def __init__(self, device: str = "cpu") -> None:
        self._weight_DV = torch.randn(D, V, generator=torch.Generator().manual_seed(0)).to(device)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return hidden_RD @ self._weight_DV


def readout(last_ids: Tensor, **settings: bool) -> Readout:
    model: Any = Head(last_ids.device.type)
    return Readout(model, SoloComm(), last_ids, Stages(), **({"samples": True, "classifies": False} | settings))


def state(seat: int, sampling: SamplingParams = GREEDY) -> SequenceState:
    start = SequenceStart(10 + seat, (5, 6, 7), 3, sampling)
    return SequenceState(start, seat, Sampled.start(start, (2,), V, lambda grammar: pytest.fail("none")), None)


def step_of(states: list[SequenceState], rows: list[int], last_ids: Tensor) -> tuple[StepInput, StepTensors]:
    """Sequences that are sampled from these rows."""
    numbers = StepMemory(8, 0).write(Rows(4), rows, [each.seat for each in states])
    return StepInput(numbers, states, states, rows, [], []), numbers.send(last_ids)


def hidden(rows: int) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(1))


def test_what_is_sampled_is_kept_in_its_sequence_s_seat() -> None:
    last_ids = torch.zeros(5, dtype=torch.int64)
    step, tensors = step_of([state(4), state(1)], [0, 1], last_ids)
    hidden_RD = hidden(2)
    ids_M, logprobs = readout(last_ids).sample(step, tensors, hidden_RD)
    assert ids_M.tolist() == Head().logits(hidden_RD).argmax(-1).tolist()
    assert last_ids.tolist() == [0, ids_M[1], 0, 0, ids_M[0]]
    assert logprobs == {}


def test_only_the_rows_that_are_sampled_from_are_looked_at() -> None:
    last_ids = torch.zeros(2, dtype=torch.int64)
    step, tensors = step_of([state(0), state(1, replace(GREEDY, logprobs=1))], [1, 3], last_ids)
    hidden_RD = hidden(4)
    ids_M, logprobs = readout(last_ids).sample(step, tensors, hidden_RD)
    assert ids_M.tolist() == Head().logits(hidden_RD[[1, 3]]).argmax(-1).tolist()
    assert logprobs.keys() == {11}
    assert logprobs[11].token_id == ids_M[1]


def test_nobody_waits_for_a_device_but_who_watches_its_own_tokens() -> None:
    """Tensors on `meta` have no numbers: whoever wants one fails."""
    last_ids = torch.zeros(3, dtype=torch.int64, device="meta")
    step, tensors = step_of([state(0), state(2, replace(GREEDY, temperature=0.8, top_p=0.9))], [0, 1], last_ids)
    ids_M, _ = readout(last_ids).sample(step, tensors, hidden(2).to("meta"))
    assert ids_M.shape == (2,)
    assert [each.sampled.num_generated for each in step.sampled if each.sampled is not None] == [1, 1]
    step, tensors = step_of([state(0, replace(GREEDY, frequency_penalty=1.0))], [0], last_ids)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        readout(last_ids).sample(step, tensors, hidden(1).to("meta"))


def test_prompts_longer_than_the_head_takes_at_once_are_judged_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    last_ids = torch.zeros(1, dtype=torch.int64)
    judged = state(0, replace(GREEDY, prompt_logprobs=0))
    step = replace(
        step_of([], [], last_ids)[0], judged=[Wanted(judged, range(1, 7), targets=(3, 4, 5, 6, 7))], pooled=[]
    )
    whole = readout(last_ids).judge(step, hidden(8))
    monkeypatch.setattr("cluster.readout.HEAD_ROWS", 2)
    parts = readout(last_ids).judge(step, hidden(8))
    assert [one.token_id for one in whole[10]] == [3, 4, 5, 6, 7]
    for one, other in zip(whole[10], parts[10], strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    assert readout(last_ids, samples=False).judge(step, hidden(8)) == {10: ()}


@pytest.mark.parametrize(("classifies", "width"), [(False, D), (True, V)])
def test_a_text_s_vector_comes_with_its_last_rows(classifies: bool, width: int) -> None:
    last_ids = torch.zeros(1, dtype=torch.int64)
    text = SequenceState(SequenceStart(7, (5, 6, 7), 3, pooling="mean"), 0, None, Pool("mean"))
    reads = readout(last_ids, classifies=classifies)
    hidden_RD = hidden(3)
    empty = step_of([], [], last_ids)[0]
    assert reads.pool(replace(empty, pooled=[Wanted(text, range(2))]), hidden_RD) == {}
    pooled = reads.pool(replace(empty, pooled=[Wanted(text, range(2, 3), ends=True)]), hidden_RD)
    ((row,),) = pooled.values()
    rows_LD = Head().logits(hidden_RD) if classifies else hidden_RD
    assert len(row) == width
    torch.testing.assert_close(torch.tensor(row), rows_LD.mean(0), rtol=1e-4, atol=1e-5)
