from __future__ import annotations

from cluster.ray_rank import node_by_node


def test_ranks_of_one_node_are_neighbours() -> None:
    assert node_by_node(["a", "b", "a", "c", "b"]) == [0, 2, 1, 4, 3]
    assert node_by_node(["a", "a", "a"]) == [0, 1, 2]
    assert node_by_node(["b", "a", "a", "b"]) == [0, 3, 1, 2], "the first bundle's node comes first"
