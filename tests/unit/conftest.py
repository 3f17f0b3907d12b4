"""Kernels run in Triton's interpreter here, whatever the machine. Triton looks at this when it is imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
