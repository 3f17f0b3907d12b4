"""The command line, mixtral-serve: serve, bench, batch, plan, convert, quantize and doctor.

Talks to people: one sentence on stderr and a status above zero when it cannot. Everything it starts, it ends:
processes, shared memory, and the directory with their logs. Ray is imported only once the configuration is right,
so that a typing error is answered at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from deployments import bench, convert, plan, quantize
from deployments.batch import BatchStopped, run_batch
from deployments.batch_file import Entry, Output, read_entries
from deployments.collectives import MAX_RANKS, examine_collectives
from deployments.config_file import ConfigFile, HttpOptions, read_config_file
from deployments.doctor import examine, page
from deployments.layout import Machine
from deployments.local_ray import access_log_here, drain, in_one_sentence, own_ray, wait_until_routed, why_it_failed
from deployments.resolve import Resolved, resolve
from deployments.settings import Auth, Settings, SettingsError, environment, load

CONFIG_HELP = "a Serve config file; without one, the defaults"

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


BATCH_HELP = """\
Answer the requests of an OpenAI batch file, without a server.

  mixtral-serve batch requests.jsonl answers.jsonl --model ~/models/mixtral

Answers are written as they come, in any order; custom_id says which is whose. Interrupted or killed, the same command
goes on where it was: no request is answered twice, none is lost.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except SettingsError as error:
        print(f"mixtral-serve: {error}", file=sys.stderr)
        return 2
    except BatchStopped as error:
        print(f"mixtral-serve: {error}; the same command goes on from here.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was anything to finish, or the second one
        return 130
    except BrokenPipeError:  # whoever reads our output has seen enough: what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _settings(file: ConfigFile, options: argparse.Namespace) -> Settings:
    overrides = list(options.set)
    if options.model is not None:
        overrides.append(f"model={json.dumps(options.model)}")
    return load(file.application.args, environment(), overrides)


def _serve(options: argparse.Namespace) -> int:
    file = read_config_file(options.config)
    settings = _settings(file, options)
    given = {name: value for name in ("host", "port") if (value := getattr(options, name)) is not None}
    address = file.http_options.model_copy(update=given)
    _check_port_free(address)
    return _run(settings, address, file.application.name, file.application.route_prefix)


def _run(settings: Settings, address: HttpOptions, name: str, route_prefix: str) -> int:
    """Serve until interrupted; the exit status."""
    with own_ray() as directory, access_log_here(directory) as access_log:
        from ray import serve

        from deployments.app import bind, machine

        resolved = resolve(settings, machine(may_grow=False))
        print(resolved.table(), flush=True)
        with in_one_sentence():
            serve.start(proxy_location="HeadOnly", http_options=address.model_dump())
        try:
            serve.run(bind(resolved, stdout=access_log), name=name, route_prefix=route_prefix)
        except RuntimeError as error:
            raise SettingsError(f"the model could not be started: {why_it_failed(name) or error}") from None
        try:
            if not wait_until_routed(_host(address), address.port, route_prefix):
                print("\nServe's proxy does not answer yet; once it does:", file=sys.stderr, flush=True)
            print(f"\n{greeting(resolved, address, route_prefix)}", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nFinishing the answers that run; Ctrl-C again ends them now.", file=sys.stderr, flush=True)
            drain(name)
    return 0


def _batch(options: argparse.Namespace) -> int:
    # No keys, and no deadline but the last: nobody comes from outside, and nobody waits for a single answer.
    settings = _settings(read_config_file(options.config), options)
    limits = settings.limits.model_copy(update={"request_timeout_s": 86400.0})
    settings = settings.model_copy(update={"auth": Auth(), "limits": limits})
    resolved = resolve(settings, _this_machine())
    entries = read_entries(options.input, resolved.model_names)
    with Output(options.output, entries) as output:
        already = len(output.done)
        failed = 0
        if already < len(entries):
            one_rank = resolved.engine.parallel.ranks == 1
            with contextlib.nullcontext() if one_rank else own_ray():
                failed = asyncio.run(_answer_all(resolved, options, entries, output))
    answered = len(output.done) - already
    print(f"{answered} requests answered, {failed} of them with an error; {already} were answered before.")
    return 0


async def _answer_all(resolved: Resolved, options: argparse.Namespace, entries: list[Entry], output: Output) -> int:
    from cluster.launch import launch, launch_in_process
    from deployments.api import create_app
    from deployments.live import Live

    alone = resolved.engine.parallel.ranks == 1
    engine = await (launch_in_process(resolved.engine) if alone else launch(resolved.engine))
    app = create_app(engine, resolved, Live(resolved.settings, {}))
    async with app.router.lifespan_context(app):
        at_once = resolved.engine.scheduler.max_running
        return await run_batch(app, engine, options.input, entries, output, at_once=at_once, quiet=options.quiet)


def _this_machine() -> Machine:
    import torch

    return Machine(os.cpu_count() or 1, torch.cuda.device_count())


def _doctor(options: argparse.Namespace) -> int:
    if options.collectives:
        return int(not examine_collectives(options.ranks))
    findings = examine()
    print(page(findings))
    return int(any(finding.state == "bad" for finding in findings))


def greeting(resolved: Resolved, address: HttpOptions, route_prefix: str) -> str:
    """What to paste next."""
    host = _host(address)
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{address.port}{route_prefix.rstrip('/')}"
    auth = resolved.settings.auth
    key = ' -H "Authorization: Bearer $KEY"' if auth.api_keys_env or auth.api_keys_file else ""
    body = json.dumps(
        {"model": resolved.model_names[0], "messages": [{"role": "user", "content": "Who are you?"}]},
        ensure_ascii=False,
    )
    return (
        f"{resolved.model_names[0]} answers at {url} (Ctrl-C ends it). Try:\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n"
    )


def _host(address: HttpOptions) -> str:
    """Where this machine finds itself."""
    return "127.0.0.1" if address.host in ("0.0.0.0", "::") else address.host  # noqa: S104


def _check_port_free(address: HttpOptions) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            where = f"{address.host}:{address.port}"
            raise SettingsError(
                f"cannot listen on {where}: {error.strerror}; choose another --port or --host."
            ) from None


def _version() -> str:
    try:
        return importlib.metadata.version("mixtral-serve")
    except importlib.metadata.PackageNotFoundError:
        return "from a directory, not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixtral-serve", description="Serve Mixtral on Ray.")
    parser.add_argument("--version", action="version", version=f"mixtral-serve {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model on this machine",
        description=SERVE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(run=_serve)
    serve.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help=CONFIG_HELP)
    serve.add_argument("--host", help="address to listen on (127.0.0.1; 0.0.0.0 lets other machines in)")
    serve.add_argument("--port", type=_port, help="port to listen on (8000)")
    bench.add_command(commands)
    batch = commands.add_parser(
        "batch",
        help="answer the requests of a file",
        description=BATCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.set_defaults(run=_batch)
    batch.add_argument("input", type=Path, metavar="INPUT.jsonl", help="requests, one a line")
    batch.add_argument("output", type=Path, metavar="OUTPUT.jsonl", help="answers, one a line; made, or gone on with")
    batch.add_argument("--config", type=Path, metavar="CONFIG.yaml", help=CONFIG_HELP)
    batch.add_argument("--quiet", action="store_true", help="no progress bar")
    for command in (serve, batch):
        command.add_argument("--model", metavar="PATH", help="checkpoint directory, or demo")
        command.add_argument(
            "--set", action="append", default=[], metavar="PATH=VALUE", help="any setting; may be given several times"
        )
    convert.add_command(commands)
    quantize.add_command(commands)
    plan.add_command(commands)
    examined = "what of this machine works, and what to change for the rest"
    doctor = commands.add_parser("doctor", help=examined, description=f"Say {examined}.")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument(
        "--collectives", action="store_true", help="instead: let ranks exchange rows, kill one, and see them go on"
    )
    doctor.add_argument("--ranks", type=_ranks, metavar="N", help="how many (default: one per GPU, or 2)")
    return parser


def _ranks(text: str) -> int:
    if not (text.isdecimal() and 2 <= int(text) <= MAX_RANKS):
        raise argparse.ArgumentTypeError(f"{text} is not a number of ranks: choose 2 to {MAX_RANKS}")
    return int(text)


def _port(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a port: choose 1 to 65535")
    return int(text)
