"""A documented import path; the code is in `amct_pytorch.auto_channel_prune.search_channel`."""

from amct_pytorch.auto_channel_prune.search_channel import SearchChannelBase

__all__ = ["SearchChannelBase"]
