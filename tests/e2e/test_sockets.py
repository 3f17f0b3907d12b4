"""Clients that misbehave, on bare sockets: they leave early, read slowly, or send half of what they announced."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server, eventually

LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "the quick",
    "max_tokens": 900,
    "temperature": 0,
    "stream": True,
    "ignore_eos": True,
}


@contextmanager
def connection(server: Server, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(30)
        client.connect((host, int(port)))
        yield client


def request(body: Any, *, path: str = "/v1/completions", length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: "
    return head.encode() + str(len(content) if length is None else length).encode() + b"\r\n\r\n" + content


def read_until(client: socket.socket, ending: bytes) -> bytes:
    received = b""
    while ending not in received:
        part = client.recv(65536)
        assert part, f"the server closed early: {received[-300:]!r}"
        received += part
    return received


def running(server: Server) -> int:
    count: int = httpx.get(f"{server.url}/health", timeout=10, verify=False).json()["running"]
    return count


def test_who_leaves_frees_its_place(server: Server) -> None:
    for body in (LONG, LONG | {"n": 3}):
        with connection(server) as client:
            client.sendall(request(body))
            read_until(client, b"data: ")
        eventually(lambda: running(server) == 0, "it was aborted")
    with connection(server) as client:
        client.sendall(request(LONG | {"stream": False, "n": 16}))
        eventually(lambda: running(server) > 0, "it runs")
    eventually(lambda: running(server) == 0, "it was aborted")


def test_who_leaves_within_a_body_costs_nothing(server: Server) -> None:
    with connection(server) as client:
        client.sendall(request(LONG, length=100_000))
    assert running(server) == 0
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_who_reads_slowly_gets_everything(server: Server) -> None:
    with connection(server, receive_buffer=8192) as client:
        client.sendall(request(LONG | {"max_tokens": 200}))
        time.sleep(1)  # all of it is computed, and none of it read
        received = b""
        while b"data: [DONE]" not in received:
            part = client.recv(2048)
            assert part
            received += part
    assert received.count(b'"finish_reason":"length"') == 1


def test_slow_readers_do_not_hold_up_others(server: Server) -> None:
    with connection(server, receive_buffer=8192) as slow:
        slow.sendall(request(LONG | {"n": 4}))
        with connection(server) as quick:
            quick.sendall(request(LONG | {"max_tokens": 5, "ignore_eos": False}))
            read_until(quick, b"data: [DONE]")
    eventually(lambda: running(server) == 0, "the slow one was aborted")


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: test\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
    ids=["no request", "negative length", "no length", "no chunk", "long header"],
)
def test_what_is_no_http_is_refused(server: Server, sent: bytes) -> None:
    with connection(server) as client:
        client.sendall(sent)
        try:
            answer = client.recv(65536)
        except ConnectionResetError:  # closed with some of it unread
            answer = b""
    assert not answer or answer.split(b" ")[1][:1] == b"4", answer[:200]
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_chunked_body_is_a_body(server: Server) -> None:
    content = json.dumps({"prompt": "the quick"}).encode()
    head = (
        b"POST /tokenize HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with connection(server) as client:
        client.sendall(head)
        for byte in content:
            client.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        assert b'"tokens"' in read_until(client, b"}")


def test_an_endless_body_is_cut_off(server: Server) -> None:
    head = (
        b"POST /tokenize HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with connection(server) as client:
        client.sendall(head)
        try:
            for _ in range(80):  # 5 MB, of which 4 are allowed
                client.sendall(chunk)
            client.sendall(b"0\r\n\r\n")
            answer = client.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert not answer or b" 413 " in answer.splitlines()[0]
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_one_connection_serves_many(server: Server) -> None:
    with connection(server) as client:
        for _ in range(3):
            client.sendall(request({"prompt": "a"}, path="/tokenize"))
            assert b" 200 " in read_until(client, b"}").splitlines()[0]
        client.sendall(request({"prompt": 1}, path="/tokenize"))
        assert b" 400 " in read_until(client, b"}}").splitlines()[0]
        client.sendall(request({"prompt": "a"}, path="/tokenize"))
        assert b" 200 " in read_until(client, b"}").splitlines()[0]
