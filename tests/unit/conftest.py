"""Kernels of model/kernels run in Triton's interpreter here, whatever the machine. Triton reads this as it is imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
