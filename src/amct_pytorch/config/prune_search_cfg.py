"""The .cfg of the channel-prune search, and the .cfg that a search writes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from amct_pytorch.config.cfg_block import shortest
from amct_pytorch.config.cfg_file import parse_prune_search_cfg, parse_retrain_cfg
from amct_pytorch.config.prune_cfg import ChannelPlan
from amct_pytorch.errors import ConfigError, ProblemList
from amct_pytorch.files import PathLike
from amct_pytorch.proto import AMCTRetrainConfig
from amct_pytorch.proto.text import print_text


@dataclass(frozen=True)
class SearchConfig:
    """What a search is asked for.

    Attributes:
        compress_ratio: original over pruned bit complexity; finite, perhaps not > 1.
        ascend_optimized: whether the number kept of each layer is a multiple of 16.
        max_prune_ratio: share of a layer's channels that may go, (0, 1].
        test_iteration: samples or pairs that sensitivity is measured on, >= 1.
        override: the skip and override entries of `override_prune_cfg`; empty without one.
        override_file: its path; empty without one.
    """

    compress_ratio: float
    ascend_optimized: bool
    max_prune_ratio: float
    test_iteration: int
    override: AMCTRetrainConfig
    override_file: str = ""


def read_search_cfg(path: PathLike) -> SearchConfig:
    """Reads the config of a search, and the file that it names.

    Args:
        path: the .cfg (message AutoChannelPruneConfig). A relative `override_prune_cfg` is
            looked for in the working directory, then beside this file.

    Raises:
        FileMissingError, FileAccessError: a file cannot be read.
        ConfigError: a text does not parse, or values are out of range.
    """
    message = parse_prune_search_cfg(path)
    problems = ProblemList(str(path), ConfigError)
    ratio, largest = shortest(message.compress_ratio), shortest(message.max_prune_ratio)
    if not math.isfinite(ratio):
        problems.add(f"compress_ratio is {ratio}; allowed: a number > 1")
    if not 0 < largest <= 1:
        problems.add(f"max_prune_ratio is {largest}; allowed: a number in (0, 1]")
    if message.test_iteration < 1:
        problems.add(f"test_iteration is {message.test_iteration}; allowed: an integer >= 1")
    problems.raise_if_any()
    override, file = AMCTRetrainConfig(), message.override_prune_cfg
    if file:
        beside = Path(path).parent / file
        if not Path(file).is_absolute() and not os.path.lexists(file) and beside.exists():
            file = str(beside)
        override = parse_retrain_cfg(file, "override_prune_cfg")
        if override.HasField("prune_config"):
            raise ConfigError(
                f"{file}: prune_config is not allowed in an override_prune_cfg; allowed are "
                "skip and override entries"
            )
    return SearchConfig(
        ratio,
        message.ascend_optimized,
        largest,
        message.test_iteration,
        override,
        file,
    )


def with_plans(
    message: AMCTRetrainConfig,
    common: ChannelPlan,
    plans: Mapping[str, ChannelPlan],
    skipped: list[str],
) -> AMCTRetrainConfig:
    """A copy of a .cfg's message that asks for channel pruning.

    Args:
        message: with skip and override entries.
        common: for layers that nothing else is said of.
        plans: by layer name, in place of what the message's overrides say.
        skipped: layers to leave alone.
    """
    result = AMCTRetrainConfig()
    result.CopyFrom(message)
    _set(result.prune_config, common)
    entries = {entry.layer_name: entry for entry in result.override_layer_configs}
    for name, plan in plans.items():
        entry = entries.get(name)
        if entry is None:
            entry = result.override_layer_configs.add(layer_name=name)
        entry.ClearField("prune_config")
        _set(entry.prune_config, plan)
    known = set(result.regular_prune_skip_layers)
    result.regular_prune_skip_layers.extend(name for name in skipped if name not in known)
    return result


def _set(block: object, plan: ChannelPlan) -> None:
    pruner = block.filter_pruner.balanced_l2_norm_filter_prune  # type: ignore[attr-defined]
    pruner.prune_ratio = plan.ratio
    pruner.ascend_optimized = plan.ascend_optimized


def cfg_text(message: AMCTRetrainConfig, comments: list[str]) -> str:
    """The text of a .cfg, after comments."""
    return "".join(f"# {line}\n" for line in comments) + print_text(message)


def exact_ratio(gone: int, number: int) -> float:
    """The shortest decimal ratio at which exactly so many of so many channels go."""
    for digits in range(1, 8):
        ratio = round(gone / number, digits)
        if 0 < ratio < 1 and round(number * ratio) == gone:
            return ratio
    return gone / number
