from __future__ import annotations

import torch

from cluster.messages import StepResult, StepTimes
from cluster.step_output import OnTheWay, StepOutput


def test_ids_are_put_where_they_belong_when_they_are_asked_for() -> None:
    known = StepResult(3, (7, 9), (), StepTimes(head=1.0), failed={9: "why"})
    ids = torch.tensor([40, 41])
    assert StepOutput(known, OnTheWay(ids)).result() == StepResult(
        3, (7, 9), (40, 41), StepTimes(head=1.0), failed={9: "why"}
    )
    assert StepOutput(known).result() is known
