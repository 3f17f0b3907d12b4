"""A batch that is killed again and again loses nothing and repeats nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.server import REPOSITORY

REQUESTS = 80
KILLS = (10, 25, 40) if os.environ.get("MIXTRAL_TEST_ALL") else (25,)  # after so many answers


def command(source: Path, target: Path, checkpoint: Path) -> list[str]:
    code = "import sys; from deployments.cli import main; sys.exit(main())"
    few = ["--set", "scheduler.max_running=4", "--quiet"]
    return [sys.executable, "-c", code, "batch", str(source), str(target), "--model", str(checkpoint), *few]


def answered(target: Path) -> int:
    return target.read_bytes().count(b"\n") if target.exists() else 0


def test_killed_and_gone_on_with(checkpoint: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    bodies = [{"model": "tiny", "prompt": f"tokens {i}", "max_tokens": 40, "temperature": 0} for i in range(REQUESTS)]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for wanted in KILLS:
        with subprocess.Popen(command(source, target, checkpoint), cwd=REPOSITORY) as process:
            deadline = time.monotonic() + 120
            while answered(target) < wanted:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.kill()
        assert answered(target) < REQUESTS
        with target.open("ab") as file:
            file.write(b'{"id": "batch_req_0", "custom_id"')  # a kill in the middle of a line
    before = [line for line in target.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    done = subprocess.run(
        command(source, target, checkpoint), cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=240
    )
    assert f"{REQUESTS - len(before)} requests answered, 0 of them with an error; {len(before)} were" in done.stdout
    after = target.read_bytes().splitlines(keepends=True)
    assert after[: len(before)] == before
    answers = [json.loads(line) for line in after]
    assert sorted(int(answer["custom_id"]) for answer in answers) == list(range(REQUESTS))
    assert {answer["response"]["status_code"] for answer in answers} == {200}
