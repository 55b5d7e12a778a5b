"""A documented import path; the code is in `amct_pytorch.auto_channel_prune`."""

from amct_pytorch.auto_channel_prune.greedy import GreedySearch
from amct_pytorch.auto_channel_prune.search_channel import SearchChannelBase
from amct_pytorch.auto_channel_prune.sensitivity import SensitivityBase, TaylorLossSensitivity

__all__ = ["GreedySearch", "SearchChannelBase", "SensitivityBase", "TaylorLossSensitivity"]
