"""The whole path, as users meet it: the command line, Ray Serve, ranks, HTTP, and the official client."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import REPOSITORY, Server, eventually

LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "the quick",
    "max_tokens": 400,
    "temperature": 0,
    "stream": True,
    "extra_body": {"ignore_eos": True},
}


def health(server: Server) -> Any:
    return httpx.get(f"{server.url}/health", headers=server.headers, timeout=10, verify=False).json()


def test_health_says_what_runs(each_server: Server, checkpoint: Path) -> None:
    answer = health(each_server)
    assert answer["status"] == "healthy"
    ranks = answer["config"]["parallel"]["tensor"]
    assert answer["config"]["model"] == str({1: checkpoint, 2: REPOSITORY / "model" / "demo"}[ranks])
    assert [rank["state"] for rank in answer["ranks"]] == ["ready"] * ranks
    assert answer["kv"]["pages_used"] <= answer["kv"]["pages_total"]
    assert httpx.get(f"{each_server.url}/ready").status_code == 200


def test_streamed_is_whole(each_client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a router looks at"}]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24}
    whole = each_client.chat.completions.create(**options)
    chunks = list(each_client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_prompts_together_are_prompts_alone(each_client: openai.OpenAI) -> None:
    prompts = ["tokens travel to", "pages of keys", "the quick brown fox"]
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    together = each_client.completions.create(prompt=prompts, **options)
    alone = [each_client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_a_seed_fixes_the_answer(each_client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the lazy dog", "max_tokens": 16, "seed": 11}
    first, second = (each_client.completions.create(**options).choices[0].text for _ in range(2))
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
    stream = client.completions.create(**LONG | {"max_tokens": 900})
    next(iter(stream))
    assert health(server)["running"] == 1
    stream.close()


def test_a_client_that_leaves_stops_its_request(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(**LONG)
    next(iter(stream))
    stream.close()
    eventually(lambda: health(server)["running"] == 0, "the request was aborted")
    whole = LONG | {"stream": False, "max_tokens": 900, "timeout": 0.15}  # 400 tokens can be there in 0.3 s
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(**whole)
    eventually(lambda: health(server)["running"] == 0, "the request without a stream was aborted")


def test_without_its_key_a_server_tells_nothing(two_ranks: Server) -> None:
    assert two_ranks.key not in two_ranks.output
    assert httpx.get(f"{two_ranks.url}/v1/models").status_code == 401
    assert httpx.get(f"{two_ranks.url}/health").json() == {"status": "healthy"}
    assert httpx.get(f"{two_ranks.url}/v1/models", headers=two_ranks.headers).status_code == 200


def test_a_rank_that_dies_costs_no_token(two_ranks: Server) -> None:
    """The stream pauses and goes on: the text is that of a run in which nobody died."""
    before = health(two_ranks)
    asked = LONG | {"max_tokens": 150}
    with two_ranks.client() as client:
        undisturbed = client.completions.create(**asked | {"stream": False}).choices[0].text
        stream = iter(client.completions.create(**asked))
        texts = [next(stream).choices[0].text]
        os.kill(before["ranks"][1]["pid"], signal.SIGKILL)
        texts += [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == undisturbed
    # On a machine that does other things the last token may have come before the death.
    eventually(lambda: health(two_ranks)["recoveries"] == before["recoveries"] + 1, "the death was noticed")
    eventually(lambda: {rank["state"] for rank in health(two_ranks)["ranks"]} == {"ready"}, "the rank was replaced")


def test_ctrl_c_finishes_answers_and_a_second_one_does_not(two_ranks: Server) -> None:
    """The clean end without a second one is how every other server here is ended."""
    belongings = two_ranks.belongings()
    assert belongings
    with two_ranks.client() as client:
        short, long = (iter(client.completions.create(**LONG | {"max_tokens": most})) for most in (50, 1500))
        id = next(short).id
        next(long)
        two_ranks.interrupt()
        two_ranks.wait_for("Ctrl-C again")
        assert [chunk.choices[0].finish_reason for chunk in short][-1] == "length"
        two_ranks.wait_for(id)  # the access log comes to this terminal
        next(long)
        two_ranks.interrupt()
        assert two_ranks.wait() == 130
    eventually(lambda: two_ranks.leaves_nothing(belongings), "everything ended and was taken away")


def test_serve_run_serves_the_same_application(serve_run: Server) -> None:
    with serve_run.client("/prefix/v1") as client:
        answer = client.completions.create(model="mixtral-demo", prompt="a", max_tokens=3)
        assert answer.choices[0].finish_reason in ("stop", "length")
        with pytest.raises(openai.BadRequestError, match="at most 2 here"):
            client.completions.create(model="mixtral-demo", prompt="a", n=3)
        shown = httpx.get(f"{serve_run.url}/prefix/health", timeout=10).json()["config"]
        assert (shown["scheduler"]["max_running"], shown["scheduler"]["max_waiting"]) == (3, 1024)
        assert shown["kv_cache"]["page_size"] == 8
        four = {"model": "mixtral-demo", "prompt": ["a"] * 4, "max_tokens": 40}
        stream = iter(client.completions.create(**LONG | four))
        seen = [next(stream).choices[0].index for _ in range(20)]
        assert len(set(seen)) <= 3, "more ran at once than were allowed"
        assert {chunk.choices[0].index for chunk in stream} >= {3}
    serve_run.interrupt()
    serve_run.wait()
    eventually(lambda: not serve_run.processes(), "every process ended")
