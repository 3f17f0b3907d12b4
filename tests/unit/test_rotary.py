"""Every kind of rotary embedding against transformers', and the properties that make it one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from model.checkpoint_files import halves_from_pairs
from model.config import MixtralConfig
from model.rotary import Rotary, rotate
from tests.tiny import CONFIG

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 3.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        (YARN, 256),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}, 256),
        (YARN | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False}, 256),
        (LLAMA3 | {"original_max_position_embeddings": 64}, 256),
        (LONG | {"original_max_position_embeddings": 64}, 256),
        (LONG | {"original_max_position_embeddings": 64, "factor": 2.5}, 256),
        (LONG | {"original_max_position_embeddings": 256}, 256),
    ],
)
def test_angles_are_those_of_transformers(rope: dict[str, Any], length: int) -> None:
    raw = CONFIG | {"head_dim": 16, "max_position_embeddings": length}
    del raw["rope_theta"]
    raw["rope_parameters"] = rope | {"rope_theta": 1e4}
    config = MixtralConfig.from_dict(raw, "config.json")
    position_T = torch.arange(length)
    cos_T1C, sin_T1C = Rotary(config, torch.device("cpu")).angles(position_T, torch.float32)
    theirs = MixtralRotaryEmbedding(transformers.MixtralConfig(**raw))
    expected = theirs(torch.zeros(1), position_T[None])
    torch.testing.assert_close(cos_T1C[:, 0], expected[0][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(sin_T1C[:, 0], expected[1][0], rtol=0, atol=2e-5)


def test_products_of_rotated_heads_depend_on_distance_alone() -> None:
    rotary = Rotary(MixtralConfig.from_dict(CONFIG, "config.json"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 16, generator=generator) for _ in range(2))

    def product(query_position: int, key_position: int) -> torch.Tensor:
        ends = [
            rotate(head, *rotary.angles(torch.tensor([position]), torch.float32))
            for head, position in ((query, query_position), (key, key_position))
        ]
        return (ends[0] * ends[1]).sum()

    torch.testing.assert_close(product(5, 2), product(105, 102), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(product(5, 2), product(5, 3), atol=1e-3)


def test_interleaved_pairs_reordered_turn_like_complex_numbers() -> None:
    """What Mistral's files mean: dimensions 2i and 2i + 1 of a head are one complex number."""
    rotary = Rotary(MixtralConfig.from_dict(CONFIG, "config.json"), torch.device("cpu"))
    head_C = torch.randn(16, generator=torch.Generator().manual_seed(0))
    turns = torch.polar(torch.ones(8), 5 / 10000.0 ** (torch.arange(0, 16, 2) / 16))
    expected = torch.view_as_real(torch.view_as_complex(head_C.view(8, 2)) * turns).flatten()
    reordered = halves_from_pairs(head_C[:, None], 16).view(1, 1, 16)
    found = rotate(reordered, *rotary.angles(torch.tensor([5]), torch.float32))
    torch.testing.assert_close(found.flatten(), halves_from_pairs(expected[:, None], 16).flatten())
