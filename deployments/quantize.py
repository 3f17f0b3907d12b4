"""`mixtral-serve quantize`: a checkpoint with weights in fewer bits, with a progress bar."""

from __future__ import annotations

import argparse

from deployments.rewriting import add_arguments, rewrite

HELP = """\
Write a checkpoint whose attention projections and experts have fewer bits. Router, norms, embedding and head stay.

  mixtral-serve quantize ~/models/mixtral ~/models/mixtral-int4 --mode int4

It serves without a setting, and answers as the source does with `quantization` set to the same mode, but is read in a
fraction of the time. int8, fp8 and int4 are written in the compressed-tensors format, nf4 in that of bitsandbytes.
docs/quantization.md says what each costs in quality. The target must not exist; it gets its name once it is whole.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "quantize",
        help="write a checkpoint with weights in fewer bits",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add_arguments(parser)
    parser.add_argument("--mode", required=True, choices=["int8", "int4", "nf4", "fp8"], help="what weights become")


def run(options: argparse.Namespace) -> int:
    from model.quantized_writer import quantize_checkpoint

    return rewrite(
        options, lambda source, target, progress: quantize_checkpoint(source, target, options.mode, progress)
    )
