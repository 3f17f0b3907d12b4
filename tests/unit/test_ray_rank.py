from __future__ import annotations

import pytest
import ray

from cluster.errors import StepFailed
from cluster.ray_rank import node_by_node, results


def test_ranks_of_one_node_are_neighbours() -> None:
    assert node_by_node(["a", "b", "a", "c", "b"]) == [0, 2, 1, 4, 3]
    assert node_by_node(["a", "a", "a"]) == [0, 1, 2]
    assert node_by_node(["b", "a", "a", "b"]) == [0, 3, 1, 2], "the first bundle's node comes first"


def test_an_answer_that_is_lost_is_no_reason_to_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(references: object, timeout: float | None = None) -> None:
        raise ray.exceptions.RaySystemError("cannot be read")

    monkeypatch.setattr(ray, "get", lost)
    with pytest.raises(StepFailed, match="a rank's answer was lost: RaySystemError"):
        results([object()])
