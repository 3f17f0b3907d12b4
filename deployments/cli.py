"""The command line, mixtral-serve. Talks to people: one sentence on stderr and a status above zero when it cannot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deployments.config_file import read_config_file
from deployments.settings import SettingsError, environment, load

SERVE_HELP = """\
Serve a Mixtral model with an OpenAI-compatible API on this machine.

  mixtral-serve serve                            the built-in demo model on http://127.0.0.1:8000
  mixtral-serve serve --model ~/models/mixtral   a checkpoint directory (Hugging Face or Mistral layout)
  mixtral-serve serve serve_config.yaml --set parallel.tensor=2

It starts a Ray of its own and ends it again: Ctrl-C lets running answers finish, a second Ctrl-C does not.
To serve on a Ray cluster that already runs, use `serve run serve_config.yaml` with RAY_ADDRESS set: the same file
and the same application.

Every setting can come from the file (under args), from the environment, or from --set, which wins:
parallel.tensor is MIXTRAL_PARALLEL__TENSOR there and --set parallel.tensor=2 here.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _serve(options)
    except SettingsError as error:
        print(f"mixtral-serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to finish, or the second one
        return 130


def _serve(options: argparse.Namespace) -> int:
    file = read_config_file(options.config)
    overrides = list(options.set)
    if options.model is not None:
        overrides.append(f"model={json.dumps(options.model)}")
    settings = load(file.application.args, environment(), overrides)
    given = {name: value for name in ("host", "port") if (value := getattr(options, name)) is not None}
    address = file.http_options.model_copy(update=given)
    # Only now: everything that is wrong so far is said at once, not after Ray has been imported and started.
    from deployments.local import run

    return run(settings, address, file.application.name, file.application.route_prefix)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixtral-serve", description="Serve Mixtral on Ray.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model on this machine",
        description=SERVE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.yaml", help="a Serve config file; without one, the defaults"
    )
    serve.add_argument("--host", help="address to listen on (127.0.0.1; 0.0.0.0 lets other machines in)")
    serve.add_argument("--port", type=_port, help="port to listen on (8000)")
    serve.add_argument("--model", metavar="PATH", help="checkpoint directory, or demo")
    serve.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="any setting; may be given several times"
    )
    return parser


def _port(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a port: choose 1 to 65535")
    return int(text)
