"""`mixtral-serve convert`: a checkpoint into the other layout, with a progress bar."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from deployments.settings import SettingsError
from model.convert import convert
from model.errors import ModelError

HELP = """\
Write a checkpoint in the other layout: the same weights, bit for bit, under other names.

  mixtral-serve convert ~/models/mixtral-hf ~/models/mixtral-consolidated --to mistral
  mixtral-serve convert ~/models/mixtral-consolidated ~/models/mixtral-hf --to huggingface

mixtral-serve reads both layouts as they are: convert for other programs. The target must not exist; it gets its name
once it is whole.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in the other layout",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint directory")
    parser.add_argument("target", type=Path, metavar="TARGET", help="directory to make")
    parser.add_argument("--to", required=True, choices=["huggingface", "mistral"], help="the layout of TARGET")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    with tqdm(unit="B", unit_scale=True, disable=options.quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            convert(options.source.expanduser(), options.target.expanduser(), options.to, progress)
        except ModelError as error:
            raise SettingsError(f"{error}.") from None
    return 0
