"""The command around the load: what it prints, what it refuses, and that Ctrl-C loses nothing that was measured."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.messages import Request, TokenEvent
from deployments.cli import main
from tests.e2e.server import free_port
from tests.unit.fake_engine import FakeEngine, app_for, failing, one_then_silence, spelling
from tests.unit.http_rig import on_a_port

SMALL = ["--prompt-tokens", "4-8", "--output-tokens", "4"]


def test_the_result_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    app = app_for(FakeEngine(spelling("abc")), {"auth": {"api_keys_env": "KEYS"}}, {"KEYS": "secret"})
    with on_a_port(app) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_KEY", "secret\n")  # as out of a file
        command = ["bench", "--url", url, "--requests", "5", "--api-key-env", "BENCH_KEY", "--json", str(file), *SMALL]
        assert main(command) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"fake at {url}, 8 streams:\n\n5 requests finished in ")
    assert "5/5" in output.err, "the progress bar"
    result = json.loads(file.read_text())
    assert result["requests"] == {"finished": 5, "failed": 0, "cut_off": 0}
    assert result["asked"] == {
        "url": url,
        "model": "fake",
        "streams": 8,
        "prompt_tokens": [4, 8],
        "output_tokens": [4, 4],
        "seed": 0,
    }
    assert "secret" not in file.read_text() + output.out + output.err


def test_a_failed_request_is_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    with on_a_port(app_for(FakeEngine(failing(ZeroDivisionError(), after=1)))) as url:
        assert main(["bench", "--url", url, "--requests", "1", "--streams", "1", "--quiet", *SMALL]) == 1
    output = capsys.readouterr()
    assert "  1 x in a stream: internal_error" in output.out
    assert output.err == ""


def test_a_server_that_is_not_there_leaves_no_empty_result(tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("{}")
    for file in (new, old):
        assert main(["bench", "--url", f"http://127.0.0.1:{free_port()}", "--json", str(file)]) == 2
    assert not new.exists()
    assert old.read_text() == "{}"


def test_a_result_that_cannot_be_written_after_all_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results" / "result.json"
    file.parent.mkdir()

    async def removing(request: Request) -> AsyncIterator[TokenEvent]:
        file.parent.rmdir()
        async for event in spelling("abc")(request):
            yield event

    with on_a_port(app_for(FakeEngine(removing))) as url:
        assert main(["bench", "--url", url, "--requests", "1", "--json", str(file), "--quiet", *SMALL]) == 2
    output = capsys.readouterr()
    assert "1 requests finished" in output.out
    assert output.err == f"mixtral-serve: {file} cannot be written: No such file or directory.\n"


def test_an_interrupt_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    async def interrupting(request: Request) -> AsyncIterator[TokenEvent]:
        if len(engine.requests) == 3:  # the first two have been answered or will never be
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        script = spelling("abc") if len(engine.requests) == 1 else one_then_silence
        async for event in script(request):
            yield event

    engine = FakeEngine(interrupting)
    with on_a_port(app_for(engine)) as url:
        assert main(["bench", "--url", url, "--streams", "2", "--duration", "600", "--quiet", *SMALL]) == 0
    assert "1 requests finished" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", f"http://127.0.0.1:{free_port()}"], " cannot be reached: Connection refused.\n"),
        (["--json", "/nowhere/result.json"], "/nowhere/result.json cannot be written: No such file or directory."),
        (["--api-key-env", "NO_SUCH_KEY"], "--api-key-env NO_SUCH_KEY: there is no such environment variable"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_a_status(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("mixtral-serve: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCH_KEY", "secret\nsecond")
    assert main(["bench", "--api-key-env", "BENCH_KEY"]) == 2
    error = capsys.readouterr().err
    assert "--api-key-env BENCH_KEY: one key is wanted, and that has a line break" in error
    assert "sec" not in error.removeprefix("mixtral-serve: --api-key-env")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "0"], "0 is not a number from 1 to 4096"),
        (["--requests", "-5"], "-5 is not a number from 1 to 10000000"),
        (["--prompt-tokens", "9-3"], "9-3 has no length in it: write the smaller number first"),
        (["--output-tokens", "many"], "many is not a number from 1 to 1048576"),
        (["--url", "localhost:8000"], "localhost:8000 is not a URL: write it like http://127.0.0.1:8000"),
        (["--url", "http://localhost:80000"], "http://localhost:80000 is not a URL: write it like http"),
        (["--url", "http://[::1"], "http://[::1 is not a URL: write it like http://127.0.0.1:8000"),
        (["--url", "http://localhost/?key=1"], "the URL has more than a host, a port and a path"),
        (["--url", "http://me:secret@localhost"], "the URL has more than a host, a port and a path"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["bench", *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
