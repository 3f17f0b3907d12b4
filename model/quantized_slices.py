"""Which layouts a quantised model can be cut into: every slice must hold whole groups of weights."""

from __future__ import annotations

from model.comm import split_rows
from model.config import MixtralConfig
from model.errors import ConfigError
from model.modes import Mode, group_size
from model.shard import Shard


def loading_mode(config: MixtralConfig, shard: Shard, wanted: Mode | None) -> Mode | None:
    """What matrices are quantised to as they are read: `wanted`, and None where they were saved quantised.

    What cannot be is refused by name, before any file is opened.
    """
    saved = config.quantization
    if saved is not None:
        if wanted not in (None, saved.mode):
            raise ConfigError(f"the checkpoint is {saved.mode} already and cannot become {wanted}: ask for none")
        check_slices(config, shard, saved.mode, saved.alignment)
        return None
    if wanted is not None:
        check_slices(config, shard, wanted, group_size(wanted) or 1)
    return wanted


def check_slices(config: MixtralConfig, shard: Shard, mode: Mode, unit: int) -> None:
    """`unit`: columns that only go together."""
    together = f"{mode} keeps {unit} columns of a matrix together, and"
    if config.hidden_size % unit:
        raise ConfigError(f"{together} hidden_size {config.hidden_size} is no multiple: use int8 or fp8")
    queries, _ = config.head_slices(shard)
    if (width := len(queries) * config.head_dim) % unit:
        raise ConfigError(
            f"{together} tensor parallel {shard.tensor_size} leaves {width} of attention's output projection on each "
            "rank: choose a smaller size, or int8 or fp8"
        )
    for width in split_rows(config.intermediate_size, shard.expert_slices):
        if width % unit:
            raise ConfigError(
                f"{together} intermediate_size {config.intermediate_size} in {shard.expert_slices} slices leaves "
                f"{width} of an expert on a rank: slice experts less, or use int8 or fp8"
            )
