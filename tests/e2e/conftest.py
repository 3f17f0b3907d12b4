"""What the files of this folder share: a tiny checkpoint and the servers that answer with it.

A server takes seconds to start, so each kind is started once for all files.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.server import Server, serving
from tests.tiny import write_checkpoint

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% if message['tool_calls'] is defined %}[TOOL_CALLS] "
    "{% for call in message['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}{% endif %}"
    "{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'tool' %}[TOOL_RESULTS] {{ message['content'] }} {{ message['tool_call_id'] }}"
    "{% else %}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }} [/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and a chat template that knows tools."""
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=1024)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return directory


@pytest.fixture(scope="session", params=[1, 2], ids=["1 rank", "2 ranks"])
def server(request: pytest.FixtureRequest, checkpoint: Path, access_log: Path) -> Iterator[Server]:
    settings = [f"parallel.tensor={request.param}", f"access_log={access_log}"]
    with serving("--model", str(checkpoint), *(f"--set={setting}" for setting in settings)) as server:
        yield server


@pytest.fixture(scope="session")
def access_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every shared server: lines are appended."""
    return tmp_path_factory.mktemp("log") / "access.jsonl"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell starts what runs in its background with Ctrl-C ignored, and so would be every server started here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
