"""The README's examples as they stand there, but for the address."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.server import REPOSITORY, Server

ADDRESS = "http://127.0.0.1:8000"
EXAMPLES = re.findall(r"```(python|sh)\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
PYTHON = [code for language, code in EXAMPLES if language == "python"]
CURL = [code for language, code in EXAMPLES if language == "sh" and "curl " in code]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(code: str, server: Server, serve_run: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with names of its own, in this process: most of what they take as commands is to import the client."""
    if "langchain_openai" in code and importlib.util.find_spec("langchain_openai") is None:
        pytest.skip("langchain-openai is not installed")
    assert ADDRESS in code
    # The tiny server goes by the other name as well, and its template knows tools.
    url = f"{serve_run.url}/prefix" if 'model="mixtral-demo"' in code else server.url
    program = compile(code.replace(ADDRESS, url), "README.md", "exec", dont_inherit=True)
    exec(program, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("code", CURL, ids=range(len(CURL)))
def test_curl(code: str, serve_run: Server, tmp_path: Path) -> None:
    command = ["bash", "-ec", code.replace(ADDRESS, f"{serve_run.url}/prefix")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert '"finish_reason":"stop"' in done.stdout
