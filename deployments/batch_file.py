"""OpenAI batch files: requests in, one a line, and answers out, one a line, in the order in which they finish.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

The output is also the memory of what is done: whoever starts again goes on where it ends. A line counts once its
newline is written, so that a kill at any moment costs the line being written and no more.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from deployments.settings import SettingsError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one request lies in the input. Its body is read when it is its turn."""

    custom_id: str
    url: str
    offset: int
    length: int


def read_entries(path: Path, model_names: Collection[str]) -> list[Entry]:
    """All requests of a file. One that could never be answered is a SettingsError, before any work is done."""
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    for number, offset, line in _lines(path):
        if not line.strip():
            continue
        request = _parsed(line, f"{path}, line {number}")
        problem = _problem(request, seen, model_names)
        if problem is not None:
            raise SettingsError(f"{path}, line {number}: {problem}.")
        seen[request["custom_id"]] = number
        entries.append(Entry(request["custom_id"], request["url"], offset, len(line)))
    return entries


def read_body(path: Path, entry: Entry) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(entry.offset)
        body: dict[str, Any] = json.loads(file.read(entry.length))["body"]
    return body


class Output:
    """The file of answers, held by this process alone."""

    def __init__(self, path: Path, entries: Iterable[Entry]) -> None:
        self._path = path
        self.done: set[str] = set()
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_up({entry.custom_id for entry in entries})
        except BlockingIOError:
            self._file.close()
            raise SettingsError(f"{path} is being written by another batch; wait for it, or choose another.") from None
        except BaseException:
            self._file.close()
            raise

    def write(self, answer: dict[str, Any]) -> None:
        line = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self.done.add(answer["custom_id"])

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def _take_up(self, asked: set[str]) -> None:
        """What earlier runs answered; a last line without its newline was never finished and goes."""
        end = 0
        for number, offset, line in _lines(self._path):
            if not line.endswith(b"\n"):
                break
            where = f"{self._path}, line {number}"
            custom_id = _parsed(line, where).get("custom_id")
            if custom_id not in asked or custom_id in self.done:
                raise SettingsError(f"{where}: {custom_id!r} is no answer to this input; choose another output file.")
            self.done.add(custom_id)
            end = offset + len(line)
        self._file.truncate(end)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset, line with its newline)"""
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SettingsError(f"{where} is not a JSON object.")
    return value


def _problem(request: dict[str, Any], seen: dict[str, int], model_names: Collection[str]) -> str | None:
    custom_id, url, body = request.get("custom_id"), request.get("url"), request.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return "custom_id must be a text"
    if custom_id in seen:
        return f"custom_id {custom_id!r} is that of line {seen[custom_id]} as well"
    if request.get("method") != "POST" or url not in URLS:
        return f"method must be POST, and url one of {', '.join(URLS)}"
    if not isinstance(body, dict):
        return "body must be an object"
    if body.get("stream"):
        return "stream is not possible in a batch"
    model = body.get("model")
    if isinstance(model, str) and model not in model_names:
        names = ", ".join(model_names)
        return (
            f"there is no model {model[:80]!r} here, only {names}; --set served_model_name=NAME gives it another name"
        )
    return None
