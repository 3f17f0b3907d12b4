"""`mixtral-serve convert`: a checkpoint into the other layout, with a progress bar."""

from __future__ import annotations

import argparse

from deployments.rewriting import add_arguments, rewrite

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
    add_arguments(parser)
    parser.add_argument("--to", required=True, choices=["huggingface", "mistral"], help="the layout of TARGET")


def run(options: argparse.Namespace) -> int:
    from model.convert import convert

    return rewrite(options, lambda source, target, progress: convert(source, target, options.to, progress))
