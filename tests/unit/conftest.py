"""Kernels run in Triton's interpreter here, whatever the machine; random cases may take their time on a busy one; torch
has one thread; what was imported is never searched for garbage."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Triton looks at this when it is imported.
os.environ["TRITON_INTERPRET"] = "1"


# Objects of libraries, 600,000 of them, stay to the end: looking through them again and again takes seconds.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """At the start of every test. Tiny tensors: a second thread only waits for the first, and whoever else is tested at
    the time waits for both."""
    torch.set_num_threads(1)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    """How many torch has; the next test has one again. Inputs should differ with them: memory that was left as it was
    must not be right by chance."""
    count: int = request.param
    torch.set_num_threads(count)
    return count
