"""Which channels go: the base class of search algorithms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from amct_pytorch.proto import PruneRecord

GraphInfo = Mapping[str, Mapping[str, Any]]
# compress_ratio, ascend_optimized, max_prune_ratio
SearchTarget = tuple[float, bool, float]


class SearchChannelBase(ABC):
    """Chooses channels; subclasses may be given to the search as instances."""

    @abstractmethod
    def channel_prune_search(
        self,
        graph_info: GraphInfo,
        search_records: Sequence[PruneRecord],
        prune_config: SearchTarget,
    ) -> dict[str, list[int]]:
        """The channels that stay.

        Args:
            graph_info: by layer name `cin`, `cout`, `ori_cout` (channels) and `bitops`.
            search_records: one record for each group of coupled channels. Its producers have
                `sensitivity` (FLOATS, one for each of their channels), and for each of their
                channels which one of the group it is (`channels`, INTS; -1: none of it), of how
                many channels of its layer a multiple goes (`multiple`, INTS) and whether it has
                to stay (`stays`, INTS). Consumers that are layers have `channels` too, for each
                place along their input; `follows` 1 says that a layer (a depthwise convolution)
                has as many channels as reach it.
            prune_config: (compress_ratio, ascend_optimized, max_prune_ratio).

        Returns:
            For each producer that loses channels a list with 1 (keep) or 0 (prune) for each of
            its channels.
        """
