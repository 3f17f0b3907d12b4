"""What the files of this folder share: a tiny checkpoint, and the servers (fleet.py).

server            one rank, the tiny checkpoint
two_ranks         the demo model, with a key
each_server       both of these, in turn
serve_run         as a newcomer starts it: Serve's own command with the shipped file
direct_streaming  server and client together in a network namespace of their own
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from tests.e2e.fleet import Fleet, Kind
from tests.e2e.server import REPOSITORY, Server, answers, eventually, free_port, mixtral_serve
from tests.quiet_ray import NO_METRICS, QUIET
from tests.tiny import write_checkpoint

NAMESPACE = ("unshare", "--map-root-user", "--net")

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


@pytest.fixture(scope="session")
def access_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every server here that has the tiny checkpoint: lines are appended."""
    return tmp_path_factory.mktemp("log") / "access.jsonl"


@pytest.fixture(autouse=True, scope="session")
def fleet(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    access_log: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    """Starts what the chosen tests ask for; the fixtures below wait until it is there."""
    # A shell starts what runs in its background with Ctrl-C ignored, and so would be every server started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tiny = ["--model", str(checkpoint), "--set", f"access_log={access_log}"]
    names = ["--set", "served_model_name=[mixtral-demo, tiny]"]
    pair = [*names, "--set", "auth.api_keys_env=KEYS", "--set", "parallel.tensor=2"]
    ray_directory = tempfile.mkdtemp(prefix="mixtral-test-", dir="/tmp")  # a short path: sockets lie in it
    run_file = tmp_path_factory.mktemp("serve_run") / "serve_config.yaml"
    kinds = {
        "server": Kind(lambda: mixtral_serve(*tiny, "--set", "served_model_name=[tiny, mixtral-8x22b]")),
        "two_ranks": Kind(lambda: mixtral_serve(*pair, environment={"KEYS": "open-sesame"}, key="open-sesame")),
        "direct_streaming": Kind(lambda: _in_namespace(checkpoint), Server.wait),
        "serve_run": Kind(lambda: _serve_run(run_file, ray_directory), _ready),
    }
    asked = {fixture for item in request.session.items for fixture in item.fixturenames}
    if "each_server" in asked:
        asked |= {"server", "two_ranks"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUIET | NO_METRICS).items():
            patch.setenv(name, value)
        fleet = Fleet({name: kind for name, kind in kinds.items() if name in asked})
        yield fleet
        fleet.end()
    shutil.rmtree(ray_directory, ignore_errors=True)


@pytest.fixture(scope="session")
def server(fleet: Fleet) -> Server:
    return fleet["server"]


@pytest.fixture(scope="session")
def two_ranks(fleet: Fleet) -> Server:
    return fleet["two_ranks"]


@pytest.fixture(scope="session", params=["server", "two_ranks"], ids=["1 rank", "2 ranks"])
def each_server(request: pytest.FixtureRequest, fleet: Fleet) -> Server:
    return fleet[request.param]


@pytest.fixture(scope="session")
def serve_run(fleet: Fleet) -> Server:
    return fleet["serve_run"]


@pytest.fixture(scope="session")
def direct_streaming(fleet: Fleet) -> Server:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip(f"{' '.join(NAMESPACE)} is refused here")
    return fleet["direct_streaming"]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def each_client(each_server: Server) -> Iterator[openai.OpenAI]:
    with each_server.client() as client:
        yield client


def _in_namespace(checkpoint: Path) -> Server:
    return Server([*NAMESPACE, sys.executable, "-m", "tests.e2e.direct_streaming", str(checkpoint)], 0)


def _serve_run(file: Path, ray_directory: str) -> Server:
    """The shipped file with another port and route, a setting from the environment, and limits from where they can be
    changed in place."""
    config = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    config["applications"][0]["route_prefix"] = "/prefix"
    limits = {"limits": {"max_n": 2}, "scheduler": {"max_running": 3}}
    config["applications"][0]["deployments"] = [{"name": "ingress", "user_config": limits}]
    file.write_text(yaml.safe_dump(config))
    environment = {"RAY_ADDRESS": "local", "RAY_TMPDIR": ray_directory, "MIXTRAL_KV_CACHE__PAGE_SIZE": "8"}
    return Server([str(Path(sys.executable).with_name("serve")), "run", str(file)], port, environment)


def _ready(server: Server) -> None:
    eventually(lambda: answers(f"{server.url}/prefix/ready"), "the application is ready", timeout_s=120)
