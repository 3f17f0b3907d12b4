"""Direct streaming, in which HAProxy hands requests straight to the replica, used by the official client.

    unshare -rn python -m tests.e2e.direct_streaming CHECKPOINT

Run in a network namespace of its own, since HAProxy also listens where nobody told it to. Server and client are both
inside; each check prints its name and "ok".
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import Server, answers, eventually, mixtral_serve

MESSAGES: list[Any] = [{"role": "user", "content": "a router looks at"}]
LONG: dict[str, Any] = {"model": "tiny", "prompt": "the quick", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", IFF_UP | IFF_RUNNING)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


def proxied(server: Server) -> bool:
    return any("haproxy" in command.split()[0] for command in server.processes().values())


def running(server: Server) -> int:
    count: int = httpx.get(f"{server.url}/health", timeout=10).json()["running"]
    return count


def chat(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8)
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 8


def stream(server: Server, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    events = client.completions.create(**LONG, stream=True)
    next(iter(events))
    assert running(server) == 1, "tokens did not arrive while others were computed"
    events.close()


def errors(server: Server, client: openai.OpenAI) -> None:
    for options, kind in (({"n": 99}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError)):
        with pytest.raises(kind) as raised:
            client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "stream": True} | options)
        assert raised.value.body, "not in OpenAI's envelope"
    assert httpx.get(f"{server.url}/nothing").json()["error"]["code"] == "route_not_found"


def disconnect(server: Server, client: openai.OpenAI) -> None:
    """Of a stream. Behind HAProxy a request without one is not always known to have been left (docs/openai.md)."""
    events = client.completions.create(**LONG, stream=True)
    next(iter(events))
    events.close()
    eventually(lambda: running(server) == 0, "the stream was aborted")


CHECKS: list[Callable[[Server, openai.OpenAI], None]] = [chat, stream, errors, disconnect]


def main(checkpoint: str) -> None:
    raise_loopback()
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    server = mixtral_serve("--model", checkpoint, environment=environment)
    try:
        server.wait_for("answers at")
        assert proxied(server)
        assert answers(f"{server.url}/ready"), "the command said so before HAProxy knew"
        with server.client() as client:
            for check in CHECKS:
                check(server, client)
                print(f"{check.__name__}: ok", flush=True)
        server.stop()
        print("end: ok", flush=True)
    finally:
        server.close()


if __name__ == "__main__":
    main(sys.argv[1])
