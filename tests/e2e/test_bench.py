"""`mixtral-serve bench` against a real server: what the client counts is what the server counts."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.cli import main
from tests.e2e.server import Server

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 12, 40, 16


def counted(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", headers=server.headers, timeout=30).text
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    return {one.name: one.value for one in samples if one.name.endswith("_tokens_total")}


def test_a_server_is_measured(each_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    monkeypatch.setenv("BENCH_KEY", each_server.key)
    command = ["bench", "--url", each_server.url, "--api-key-env", "BENCH_KEY", "--streams", "4", "--quiet"]
    command += ["--requests", str(REQUESTS), "--prompt-tokens", str(PROMPT_TOKENS)]
    before = counted(each_server)
    assert main([*command, "--output-tokens", str(OUTPUT_TOKENS), "--json", str(file)]) == 0
    after = counted(each_server)
    result = json.loads(file.read_text())
    assert result["requests"] == {"finished": REQUESTS, "failed": 0, "cut_off": 0}
    assert result["output_tokens"] == REQUESTS * OUTPUT_TOKENS
    generated, computed = (f"mixtral_{name}_tokens_total" for name in ("generation", "prompt"))
    assert after[generated] - before[generated] == REQUESTS * OUTPUT_TOKENS
    assert after[computed] - before[computed] == REQUESTS * PROMPT_TOKENS, "none came from the prefix cache"
    assert result["first_token_s"]["count"] == result["whole_answer_s"]["count"] == REQUESTS
    assert 0 < result["first_token_s"]["p50"] <= result["whole_answer_s"]["p50"]
