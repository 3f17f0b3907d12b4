"""A replica that goes away under real Serve: readiness first, then nobody new, then the last token of whoever runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx
import pytest

from deployments.local_ray import drain
from deployments.resolve import Machine, resolve
from deployments.settings import load
from tests.cluster.served import eventually
from tests.e2e.server import free_port

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray Serve's own

TOKENS = 600  # some seconds of them: the stream is still under way when it is drained
BODY = {"model": "mixtral-demo", "prompt": "The router", "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture
def url(local_ray: None) -> Iterator[str]:
    from ray import serve

    from deployments.app import bind

    port = free_port()
    resolved = resolve(load({"access_log": None}), Machine(cores=2, gpus=0))
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(bind(resolved), name="drained", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_streams_finish_and_nobody_new_is_taken_in(url: str) -> None:
    assert httpx.get(f"{url}/ready", timeout=60).status_code == 200
    whole = _text(
        httpx.post(f"{url}/v1/completions", json=BODY | {"max_tokens": TOKENS}, timeout=120).text.splitlines()
    )
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"max_tokens": TOKENS}, timeout=120) as answer:
        lines = answer.iter_lines()
        read = [next(lines) for _ in range(4)]
        leaving = threading.Thread(target=drain, args=("drained",))
        leaving.start()
        eventually(lambda: httpx.get(f"{url}/ready", timeout=60).status_code != 200, "readiness fails first")
        late = httpx.post(f"{url}/v1/completions", json=BODY | {"max_tokens": 1}, timeout=60)
        assert late.status_code in (503, 404), late.text  # draining; or the route is gone already
        read += list(lines)
    leaving.join()
    assert _text(read) == whole
    assert read[-1] == "" or read[-1] == "data: [DONE]"


def _text(lines: list[str]) -> str:
    """The text of a stream, however it was cut."""
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
