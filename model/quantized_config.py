"""What a checkpoint's config.json says of quantisation, what is written there, and which slices a layout may cut.

Each format's fields: quantized_compressed.py, quantized_bitsandbytes.py.
"""

from __future__ import annotations

from typing import Any, assert_never

from model.fields import Fields
from model.modes import GROUP_SIZE, Mode
from model.quantized_bitsandbytes import BitsAndBytes, read_bitsandbytes
from model.quantized_compressed import FloatQuantized, PackQuantized, read_compressed_tensors
from model.quantized_files import QuantizedFormat


def read_quantization(fields: Fields, table: dict[str, Any]) -> QuantizedFormat:
    """What is not served is refused by name."""
    config = fields.nested("quantization_config", table)
    method = config.choice("quant_method", None, ("compressed-tensors", "bitsandbytes"))
    if method is None:
        config.refuse("quant_method", "is missing: compressed-tensors and bitsandbytes are served")
    return read_bitsandbytes(config) if method == "bitsandbytes" else read_compressed_tensors(config)


def format_for(mode: Mode) -> QuantizedFormat:
    """What weights quantised here are written as: formats that other programs read."""
    match mode:
        case "int8":
            return PackQuantized(8, None)
        case "int4":
            return PackQuantized(4, GROUP_SIZE)
        case "fp8":
            return FloatQuantized()
        case "nf4":
            return BitsAndBytes(nested=False)
    assert_never(mode)
