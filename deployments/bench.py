"""`mixtral-serve bench`: load on a running server, and how fast it answered. Talks to people, with a progress bar."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from deployments.bench_load import Workload, connected, put_load
from deployments.bench_report import Measurements, page
from deployments.settings import SettingsError, environment

HELP = """\
Ask a running server again and again, and say how fast it answered.

  mixtral-serve bench                                        8 streams for 30 s at http://127.0.0.1:8000
  mixtral-serve bench --streams 64 --prompt-tokens 1024 --output-tokens 64-256 --duration 120
  mixtral-serve bench --url https://mixtral.example.com --api-key-env KEY --requests 1000 --json result.json

Each stream asks again once its answer is complete. Times are those of this client: until the first text, between two
arrivals of text, and until the end. Ctrl-C ends it early and prints what was measured. The status is 1 where a request
failed.
"""
REFRESH_S = 0.5
DURATION_S = 30.0


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure how fast a running server answers",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--url", type=_url, default="http://127.0.0.1:8000", help="of the server (http://127.0.0.1:8000)"
    )
    parser.add_argument("--model", metavar="NAME", help="one that it serves (its first)")
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable with the API key")
    parser.add_argument("--streams", type=_number(4096), default=8, metavar="N", help="requests at once (8)")
    lengths = _lengths(1 << 20)
    parser.add_argument("--prompt-tokens", type=lengths, default=range(128, 129), metavar="N", help="or N-M (128)")
    parser.add_argument("--output-tokens", type=lengths, default=range(128, 129), metavar="N", help="or N-M (128)")
    parser.add_argument("--requests", type=_number(10_000_000), metavar="N", help="end after so many")
    parser.add_argument(
        "--duration",
        type=_number(86400),
        metavar="S",
        help="end after so many seconds (30, unless --requests is given)",
    )
    parser.add_argument(
        "--seed", type=_number(1 << 31, least=0), default=0, metavar="N", help="of prompts and lengths (0)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    duration = DURATION_S if options.duration is None and options.requests is None else options.duration
    workload = Workload(
        options.streams, options.prompt_tokens, options.output_tokens, options.requests, duration, options.seed
    )
    if options.json is not None:
        _check_writable(options.json)  # now, not after an hour
    model, measured = asyncio.run(_measure(options, workload))
    report = measured.report()
    print(f"{model} at {options.url}, {workload.streams} streams:\n\n{page(report)}")
    if options.json is not None:
        asked = {
            "url": options.url,
            "model": model,
            "streams": workload.streams,
            "prompt_tokens": [workload.prompt_tokens[0], workload.prompt_tokens[-1]],
            "output_tokens": [workload.output_tokens[0], workload.output_tokens[-1]],
            "seed": workload.seed,
        }
        with _said_why(options.json):
            options.json.write_text(json.dumps({"asked": asked} | report, indent=1) + "\n")
    return int(bool(report["errors"]))


async def _measure(options: argparse.Namespace, workload: Workload) -> tuple[str, Measurements]:
    """The model's name, and what was seen."""
    async with connected(options.url, _key(options.api_key_env), options.model, workload) as target:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stop() -> None:  # a second Ctrl-C ends us at once
            loop.remove_signal_handler(signal.SIGINT)
            stopped.set()

        loop.add_signal_handler(signal.SIGINT, stop)
        measured = Measurements()
        async with _shown(measured, workload, quiet=options.quiet):
            await put_load(target, workload, measured, stopped)
        return target.model, measured


def _check_writable(path: Path) -> None:
    """And leave it as it is."""
    with _said_why(path):
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()


@contextmanager
def _said_why(path: Path) -> Iterator[None]:
    """That it cannot be written, where that is so."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}.") from None


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := environment().get(variable, "").strip()):
        raise SettingsError(f"--api-key-env {variable}: there is no such environment variable, or it is empty.")
    if not key.isprintable():
        raise SettingsError(
            f"--api-key-env {variable}: one key is wanted, and that has a line break or the like in it."
        )
    return key


@asynccontextmanager
async def _shown(measured: Measurements, workload: Workload, *, quiet: bool) -> AsyncIterator[None]:
    with tqdm(total=workload.requests, unit=" requests", disable=quiet) as bar:

        def show() -> None:
            rate = measured.output_tokens / measured.seconds
            bar.set_postfix_str(f"{rate:.0f} tokens/s, {measured.errors.total()} errors", refresh=False)
            bar.update(measured.finished + measured.errors.total() - bar.n)

        async def keep_showing() -> None:
            while True:
                await asyncio.sleep(REFRESH_S)
                show()

        showing = asyncio.create_task(keep_showing())
        try:
            yield
        finally:
            showing.cancel()
            show()


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # reading it checks it
    except ValueError:
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"{text} is not a URL: write it like http://127.0.0.1:8000")
    if parts.query or parts.fragment or parts.username is not None:  # a result has the URL in it, but no secret
        raise argparse.ArgumentTypeError("the URL has more than a host, a port and a path")
    return text


def _number(most: int, least: int = 1) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")
        return int(text)

    return number


def _lengths(most: int) -> Callable[[str], range]:
    number = _number(most)

    def lengths(text: str) -> range:
        low, dash, high = text.partition("-")
        found = range(number(low), number(high if dash else low) + 1)
        if not found:
            raise argparse.ArgumentTypeError(f"{text} has no length in it: write the smaller number first")
        return found

    return lengths
