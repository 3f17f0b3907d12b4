"""What the commands that write one checkpoint from another have in common: their arguments, and a progress bar."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from deployments.settings import SettingsError
from model.errors import ModelError

# Source, target, and who hears of bytes done and bytes in all.
Rewrite = Callable[[Path, Path, Callable[[int, int], None]], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint directory")
    parser.add_argument("target", type=Path, metavar="TARGET", help="directory to make")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def rewrite(options: argparse.Namespace, action: Rewrite) -> int:
    """The exit status. SettingsError says in a sentence what is wrong with the source or the target."""
    with contextlib.ExitStack() as stack:
        bar: tqdm[NoReturn] | None = None  # once there is progress: what is refused has none

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, disable=options.quiet))
            bar.update(done - bar.n)

        try:
            action(options.source.expanduser(), options.target.expanduser(), progress)
        except ModelError as error:
            raise SettingsError(f"{error}.") from None
    return 0
