"""Threads that keep a server busy while a test does something to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(count: int, work: Callable[[int, threading.Event], None]) -> Iterator[None]:
    """So many threads do the work, each with its number, until the block ends: then the event is set."""
    ended = threading.Event()
    threads = [threading.Thread(target=work, args=(number, ended)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
