"""Kernels run in Triton's interpreter here, whatever the machine; random cases may take their time on a busy one; torch
has one thread."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Triton looks at this when it is imported.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """At the start of every test. Tiny tensors: a second thread only waits for the first, and whoever else is tested at
    the time waits for both."""
    torch.set_num_threads(1)
