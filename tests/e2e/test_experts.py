"""GET /v1/experts of an engine that computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.in_process import application
from tests.tiny import CONFIG, write_checkpoint


async def test_shares_of_every_layer_add_up_once_something_was_computed(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    async with application(directory) as http:
        before = (await http.get("/v1/experts")).json()
        answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": "the router", "max_tokens": 3})
        assert answer.status_code == 200, answer.text
        after = (await http.get("/v1/experts")).json()
    assert len(before["layers"]) == len(after["layers"]) == CONFIG["num_hidden_layers"]
    assert [expert["ranks"] for expert in after["layers"][0]["experts"]] == [[0]] * CONFIG["num_local_experts"]
    assert {expert["load"] for layer in before["layers"] for expert in layer["experts"]} == {0.0}
    for layer in after["layers"]:
        assert sum(expert["load"] for expert in layer["experts"]) == pytest.approx(1.0)
        assert layer["imbalance"] == 1.0, "there is one rank"
