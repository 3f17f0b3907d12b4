"""The whole path, as users meet it: the command line, Ray Serve, ranks, HTTP, and the official client."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.e2e.server import Server, eventually, free_port, mixtral_serve, serving
from tests.tiny import write_checkpoint

LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "the quick",
    "max_tokens": 400,
    "temperature": 0,
    "stream": True,
    "extra_body": {"ignore_eos": True},
}


def health(server: Server) -> Any:
    return httpx.get(f"{server.url}/health", timeout=10).json()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def processes_of_group(group: int) -> list[str]:
    """What still runs of a server's session, from /proc; zombies have ended."""
    lines = subprocess.run(["ps", "-eo", "sess=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in lines.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def test_health_says_what_runs(server: Server, checkpoint: Path) -> None:
    answer = health(server)
    assert answer["status"] == "healthy"
    assert answer["config"]["model"] == str(checkpoint)
    assert [rank["state"] for rank in answer["ranks"]] == ["ready"] * answer["config"]["parallel"]["tensor"]
    assert answer["kv"]["pages_used"] <= answer["kv"]["pages_total"]
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_streamed_is_whole(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a router looks at"}]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_prompts_together_are_prompts_alone(client: openai.OpenAI) -> None:
    prompts = ["tokens travel to", "pages of keys", "the quick brown fox"]
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    together = client.completions.create(prompt=prompts, **options)
    alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_a_seed_fixes_the_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the lazy dog", "max_tokens": 16, "seed": 11}
    first, second = (client.completions.create(**options).choices[0].text for _ in range(2))
    assert first == second


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "a router", "temperature": 0, "max_tokens": 24}
    text = client.completions.create(**options).choices[0].text
    stop = text[len(text) // 2 :][:3]
    stopped = client.completions.create(**options, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_errors_keep_their_status_behind_serve(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="fox " * 600, stream=True)
    assert "this server takes 1024" in long.value.message
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="unknown", prompt="a")
    assert httpx.get(f"{server.url}/nothing").json()["error"]["code"] == "route_not_found"
    nan = httpx.post(
        f"{server.url}/v1/completions", content='{"seed": NaN}', headers={"Content-Type": "application/json"}
    )
    assert nan.status_code == 400


def test_tokens_arrive_while_others_are_computed(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(**LONG)
    next(iter(stream))
    assert health(server)["running"] == 1
    stream.close()


def test_a_client_that_leaves_stops_its_request(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(**LONG)
    next(iter(stream))
    stream.close()
    eventually(lambda: health(server)["running"] == 0, "the request was aborted")
    whole = LONG | {"stream": False, "timeout": 0.3}
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(**whole)
    eventually(lambda: health(server)["running"] == 0, "the request without a stream was aborted")


def test_keys_and_a_rank_that_dies(checkpoint: Path) -> None:
    """The stream pauses and goes on: the text is that of a run in which nobody died."""
    arguments = ["--model", str(checkpoint), "--set", "auth.api_keys_env=KEYS", "--set", "parallel.tensor=2"]
    with serving(*arguments, environment={"KEYS": "open-sesame"}) as server:
        assert "open-sesame" not in server.output
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert health(server) == {"status": "healthy"}
        headers = {"Authorization": "Bearer open-sesame"}
        ranks = httpx.get(f"{server.url}/health", headers=headers).json()["ranks"]
        with openai.OpenAI(api_key="open-sesame", base_url=f"{server.url}/v1", max_retries=0, timeout=120) as client:
            undisturbed = client.completions.create(**LONG | {"stream": False}).choices[0].text
            stream = iter(client.completions.create(**LONG))
            texts = [next(stream).choices[0].text]
            os.kill(ranks[1]["pid"], signal.SIGKILL)
            texts += [chunk.choices[0].text for chunk in stream]
        assert "".join(texts) == undisturbed
        after = httpx.get(f"{server.url}/health", headers=headers).json()
        assert after["recoveries"] == 1
        assert [rank["state"] for rank in after["ranks"]] == ["ready", "ready"]


def test_ctrl_c_finishes_answers_and_leaves_nothing(checkpoint: Path) -> None:
    directories = set(Path("/tmp").glob("mixtral-*"))
    memory = {path for path in Path("/dev/shm").iterdir() if "plasma" in path.name}
    with serving("--model", str(checkpoint)) as server:
        client = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0)
        stream = iter(client.completions.create(**LONG))
        next(stream)
        assert any("ray::" in line for line in processes_of_group(server.process.pid))
        server.interrupt()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        client.close()
        assert server.wait() == 0
        assert "Traceback" not in server.output
        eventually(lambda: not processes_of_group(server.process.pid), "every process ended")
        assert set(Path("/tmp").glob("mixtral-*")) == directories
        assert {path for path in Path("/dev/shm").iterdir() if "plasma" in path.name} == memory


def test_a_second_ctrl_c_does_not_wait(checkpoint: Path) -> None:
    with serving("--model", str(checkpoint)) as server:
        body = {key: value for key, value in LONG.items() if key != "extra_body"} | {"ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
            server.interrupt()
            server.wait_for("Ctrl-C again")
            server.interrupt()
            assert server.wait() == 130
        eventually(lambda: not processes_of_group(server.process.pid), "every process ended")


def test_a_model_that_cannot_start_says_why_in_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    broken = write_checkpoint(tmp_path / "broken")
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    server = mixtral_serve("--model", str(broken), port=free_port())
    try:
        assert server.wait() == 2
        last = server.output.splitlines()[-1]
        assert last.startswith("mixtral-serve: the model could not be started: ")
        assert "model.safetensors" in last
        assert "Traceback" not in server.output
    finally:
        server.close()


def test_serve_run_serves_the_same_application(checkpoint: Path, tmp_path: Path) -> None:
    """`serve run` with the shipped file: another port and model, and a limit from where it can be changed in place."""
    config = yaml.safe_load(Path("serve_config.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    config["applications"][0]["route_prefix"] = "/prefix"
    config["applications"][0]["deployments"] = [{"name": "ingress", "user_config": {"limits": {"max_n": 2}}}]
    file = tmp_path / "serve_config.yaml"
    file.write_text(yaml.safe_dump(config))
    ray_directory = tempfile.mkdtemp(prefix="mixtral-test-", dir="/tmp")  # a short path: sockets lie in it
    environment = {"RAY_ADDRESS": "local", "RAY_TMPDIR": ray_directory, "MIXTRAL_MODEL": str(checkpoint)}
    server = Server([str(Path(sys.executable).with_name("serve")), "run", str(file)], port, environment)
    try:
        eventually(lambda: answers(f"{server.url}/prefix/ready"), "the application is ready", timeout_s=120)
        with openai.OpenAI(api_key="none", base_url=f"{server.url}/prefix/v1", max_retries=0) as client:
            answer = client.completions.create(model="tiny", prompt="a", max_tokens=3)
            assert answer.choices[0].finish_reason in ("stop", "length")
            with pytest.raises(openai.BadRequestError, match="at most 2 here"):
                client.completions.create(model="tiny", prompt="a", n=3)
        server.interrupt()
        server.wait()
    finally:
        server.close()
        shutil.rmtree(ray_directory, ignore_errors=True)
