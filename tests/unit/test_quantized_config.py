"""What a checkpoint says of its quantisation is understood, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import MixtralConfig
from model.errors import ConfigError
from model.quantized_bitsandbytes import BitsAndBytes
from model.quantized_compressed import FloatQuantized, PackQuantized
from model.quantized_config import format_for
from model.quantized_files import QuantizedFormat
from tests.quantized_checkpoints import BITSANDBYTES, compressed, scheme
from tests.tiny import CONFIG

INT4 = scheme(num_bits=4, type="int", strategy="group", group_size=128)
FP8 = scheme(num_bits=8, type="float", strategy="channel")
DYNAMIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def read(quantization: dict[str, Any]) -> QuantizedFormat | None:
    config = MixtralConfig.from_dict(CONFIG | {"quantization_config": quantization}, "config.json")
    assert config.unknown == ()
    return config.quantization


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({}, None),
        (compressed("pack-quantized", INT4), PackQuantized(4, 128)),
        (compressed("pack-quantized", INT4 | {"input_activations": None}), PackQuantized(4, 128)),
        (compressed("pack-quantized", scheme(num_bits=4, type="int", group_size=32)), PackQuantized(4, 32)),
        (compressed("pack-quantized", scheme(num_bits=4, type="int", group_size=-1)), PackQuantized(4, None)),
        (compressed("pack-quantized", scheme(num_bits=4, strategy="channel", actorder=None)), PackQuantized(4, None)),
        (compressed("pack-quantized", scheme(num_bits=8, strategy="channel")), PackQuantized(8, None)),
        (compressed("float-quantized", FP8), FloatQuantized()),
        (compressed("float-quantized", FP8 | {"input_activations": DYNAMIC}), FloatQuantized()),
        (compressed("naive-quantized", scheme(num_bits=8, type="float", strategy="tensor")), FloatQuantized(True)),
        (BITSANDBYTES, BitsAndBytes(nested=False)),
        (BITSANDBYTES | {"bnb_4bit_use_double_quant": True, "llm_int8_threshold": 6.0}, BitsAndBytes(nested=True)),
    ],
)
def test_served_formats(quantization: dict[str, Any], expected: QuantizedFormat | None) -> None:
    assert read(quantization) == expected


@pytest.mark.parametrize("mode", ["int8", "int4", "nf4", "fp8"])
def test_what_is_written_is_understood(mode: Any) -> None:
    assert read(format_for(mode).config()) == format_for(mode)
    assert format_for(mode).mode == mode


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, 'quant_method must be one of compressed-tensors, bitsandbytes, not "awq"'),
        ({"quant_method": "gptq"}, 'not "gptq"'),
        ({"quant_method": "fp8", "activation_scheme": "static"}, 'not "fp8"'),
        ({"bits": 4}, "quant_method is missing"),
        (compressed("int-quantized", FP8), "format must be one of pack-quantized"),
        (compressed("pack-quantized", INT4, quantization_status="frozen"), "quantization_status is"),
        (compressed("pack-quantized", INT4, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is"),
        (compressed("pack-quantized", INT4, sparsity_config={"format": "sparse-24"}), "sparsity_config is"),
        (compressed("pack-quantized", INT4, transform_config={"config_groups": {"R1": {}}}), "transform_config is"),
        (compressed("pack-quantized", INT4, config_groups={}), "config_groups has 0 groups"),
        (compressed("pack-quantized", INT4, config_groups={"a": INT4, "b": FP8}), "config_groups has 2 groups"),
        (compressed("pack-quantized", {"targets": ["Linear"]}), "config_groups.group_0: weights is missing"),
        (compressed("pack-quantized", INT4 | {"input_activations": DYNAMIC}), "input_activations is"),
        (compressed("float-quantized", FP8 | {"input_activations": DYNAMIC | {"dynamic": False}}), "dynamic is false"),
        (compressed("float-quantized", FP8 | {"output_activations": DYNAMIC}), "output_activations is"),
        (compressed("pack-quantized", scheme(num_bits=4, symmetric=False)), "symmetric is false"),
        (compressed("pack-quantized", scheme(num_bits=4, actorder="group", group_size=128)), 'actorder is "group"'),
        (compressed("pack-quantized", scheme(num_bits=3, strategy="channel")), "num_bits is 3"),
        (compressed("pack-quantized", scheme(num_bits=8, group_size=128, strategy="group")), 'strategy is "group"'),
        (compressed("pack-quantized", scheme(num_bits=4, strategy="tensor")), "strategy must be one of"),
        (compressed("pack-quantized", scheme(num_bits=4, strategy="group", group_size=4)), "group_size must be"),
        (compressed("pack-quantized", FP8), 'type is "float"'),
        (compressed("float-quantized", scheme(num_bits=8, type="float", strategy="block")), "strategy must be one of"),
        (compressed("float-quantized", INT4), 'type is "int"'),
        (BITSANDBYTES | {"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit must be true"),
        (BITSANDBYTES | {"bnb_4bit_quant_type": "fp4"}, 'bnb_4bit_quant_type is "fp4"'),
        (BITSANDBYTES | {"bnb_4bit_quant_storage": "bfloat16"}, 'bnb_4bit_quant_storage is "bfloat16"'),
    ],
)
def test_what_is_not_served_is_refused_by_name(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: quantization_config: .*{message}"):
        read(quantization)
