"""The command line up to the point where Ray would start: what it reads, what it refuses, what it says."""

from __future__ import annotations

import socket
import tomllib
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from deployments.cli import greeting, main
from deployments.config_file import HttpOptions, read_config_file
from deployments.resolve import Resolved
from deployments.settings import Settings, SettingsError

ROOT = Path(__file__).parents[2]


def test_the_shipped_file_is_the_default() -> None:
    assert read_config_file(Path("serve_config.yaml")).http_options == read_config_file(None).http_options
    shipped, default = read_config_file(Path("serve_config.yaml")).application, read_config_file(None).application
    assert shipped.model_copy(update={"args": {}}) == default


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("http_options: {prot: 1}", r"http_options.prot is not a field; did you mean port\?"),
        ("http_options: {port: 70000}", "http_options.port: should be less than or equal to 65535"),
        ("http_options: {request_timeout_s: 3}", "`serve run` knows it"),
        ("applications: []", "applications: should have at least 1 item, not"),
        ("applications: [{import_path: 'a:b'}]", "import_path is a:b, not deployments.app:build"),
        ("applications: [{import_path: 'deployments.app:build', deployments: []}]", "applications\\[0\\].deployments"),
        ("- 1", "valid dictionary"),
        ("{", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_honoured_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=message) as refused:
        read_config_file(file)
    assert "\n" not in str(refused.value)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config_file(tmp_path / "empty.yaml") == read_config_file(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "/nowhere.yaml"], "/nowhere.yaml cannot be read: No such file or directory."),
        (["serve", "--set", "parallel.tensr=2"], "parallel.tensr is not a field; did you mean tensor?"),
        (["serve", "--set", "nonsense"], "write it as PATH=VALUE"),
        (["serve", "--model", ""], "model: should have at least 1 character"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("mixtral-serve: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MIXTRAL_PARALLEL__TENSOR", "none at all")
    assert main(["serve"]) == 2
    assert "parallel.tensor: should be a valid integer" in capsys.readouterr().err


def test_a_port_in_use_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    expected = f"mixtral-serve: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    "arguments", [["serve", "--port", "0"], ["serve", "--port", "x"], ["serve", "--prot", "1"], []]
)
def test_wrong_flags_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: mixtral-serve" in capsys.readouterr().err


def test_help_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "Ctrl-C" in text
    assert "serve run serve_config.yaml" in text


def test_its_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"mixtral-serve {declared}\n"


@pytest.mark.parametrize(
    ("host", "prefix", "url"),
    [
        ("127.0.0.1", "/", "http://127.0.0.1:8000/v1/chat/completions"),
        ("0.0.0.0", "/", "http://127.0.0.1:8000/v1/chat/completions"),
        ("10.1.2.3", "/mixtral", "http://10.1.2.3:8000/mixtral/v1/chat/completions"),
        ("::1", "/", "http://[::1]:8000/v1/chat/completions"),
    ],
)
def test_the_greeting_can_be_pasted(host: str, prefix: str, url: str) -> None:
    resolved = Resolved(Settings(served_model_name=["a-name"]), EngineConfig("somewhere"))
    text = greeting(resolved, HttpOptions(host=host), prefix)
    assert url in text
    assert '"model": "a-name"' in text
    assert "Authorization" not in text


def test_the_greeting_mentions_a_key_where_one_is_needed() -> None:
    settings = Settings.model_validate({"served_model_name": ["a"], "auth": {"api_keys_env": "KEYS"}})
    assert "Bearer $KEY" in greeting(Resolved(settings, EngineConfig("somewhere")), HttpOptions(), "/")
