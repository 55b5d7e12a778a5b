"""The steps in which a group of coupled channels can shrink."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from amct_pytorch.algorithms.channel_choice import kept_of
from amct_pytorch.auto_channel_prune.complexity import channels_in
from amct_pytorch.errors import ModelError
from amct_pytorch.proto import PruneNode, PruneRecord
from amct_pytorch.record.attributes import attribute


@dataclass(frozen=True)
class Share:
    """Channels of a group that the same layers make.

    Attributes:
        order: those that may go, the least sensitive first.
        number: of them all, in channels of the layers.
        entries: channels of a layer for each of the group.
        multiple: of how many channels of a layer a multiple goes.
    """

    order: np.ndarray
    number: int
    entries: int
    multiple: int

    def gone(self, ratio: float, ascend_optimized: bool) -> int:
        """How many channels of the group go at a ratio."""
        kept = kept_of(self.number, ratio, ascend_optimized, self.multiple)
        return min((self.number - kept) // self.entries, len(self.order))


@dataclass(frozen=True)
class Ladder:
    """The channels that go at each step, one more step at a time.

    Attributes:
        sensitivity: of each channel of the group.
        steps: channels that each step takes in addition.
        costs: what each step costs.
    """

    sensitivity: np.ndarray
    steps: tuple[np.ndarray, ...]
    costs: tuple[float, ...]

    @classmethod
    def of(
        cls,
        record: PruneRecord,
        ascend_optimized: bool,
        max_prune_ratio: float,
        *,
        rated: bool = True,
    ) -> Ladder:
        """The steps of one record.

        Args:
            record: whose producers have `sensitivity`.
            ascend_optimized: whether the number kept is a multiple of 16.
            max_prune_ratio: share of a layer's channels that may go at most.
            rated: whether producers have `sensitivity`; if not, all channels are equal.

        Raises:
            ModelError: sensitivities are missing, too few, or NaN.
        """
        sensitivity = _sensitivity(record) if rated else np.zeros(channels_in(record))
        shares = list(_shares(record, sensitivity))
        counts = [0] * len(shares)
        steps = []
        for ratio in _ratios(shares):
            wanted = [share.gone(ratio, ascend_optimized) for share in shares]
            beyond = any(
                count * share.entries > max_prune_ratio * share.number + 1e-9
                for count, share in zip(wanted, shares, strict=True)
            )
            if beyond:
                break
            if wanted != counts:
                taken = [
                    share.order[count:more]
                    for share, count, more in zip(shares, counts, wanted, strict=True)
                ]
                steps.append(np.concatenate(taken))
                counts = wanted
        return cls(sensitivity, tuple(steps), _costs(sensitivity, steps))


def _costs(sensitivity: np.ndarray, steps: list[np.ndarray]) -> tuple[float, ...]:
    """What each step costs: the sensitivity it takes, and more the fewer channels are left.

    Sensitivities are of first order: of one channel that goes while the others stay. Added up,
    they say that the last channels of a layer are worth no more than the first, and a search
    cuts one layer to a thread and leaves the next one whole. So of n channels the one that goes
    when x are left counts (n / x)² times; between k before a step and l after it that is
    n² / (k l) on average. The square is found by trial (`benchmarks/README.md`).
    """
    number = len(sensitivity)
    costs, left = [], number
    for step in steps:
        after = left - len(step)
        # One channel stays of each layer; a step that takes them all costs as if it did here.
        factor = number**2 / (left * max(after, 1))
        costs.append(float(sensitivity[step].sum()) * factor)
        left = after
    return tuple(costs)


def _ratios(shares: list[Share]) -> list[float]:
    found = {gone / share.number for share in shares for gone in range(1, share.number)}
    return sorted(found)


def _sensitivity(record: PruneRecord) -> np.ndarray:
    """Of each channel of the group: the mean over the places where layers make it."""
    number = channels_in(record)
    sums, times = np.zeros(number), np.zeros(number)
    for node in record.producer:
        own, values = attribute(node, "channels"), attribute(node, "sensitivity")
        if values is None or len(values) != len(own):
            found = "none" if values is None else f"{len(values)} values"
            raise ModelError(
                f"{node.name}: its sensitivity has {found}; it needs FLOATS, one for each of its "
                f"{len(own)} channels"
            )
        if not np.isfinite(values).all():
            raise ModelError(f"{node.name}: its sensitivity has values that are NaN or infinite")
        at = np.array(own)
        inside = at >= 0
        sums += np.bincount(at[inside], np.array(values)[inside], minlength=number)
        times += np.bincount(at[inside], minlength=number)
    return sums / np.maximum(times, 1)


def _shares(record: PruneRecord, sensitivity: np.ndarray) -> Iterator[Share]:
    number = len(sensitivity)
    table = np.stack([_counts(node, number) for node in record.producer], axis=1)
    multiple, stays = np.ones(number, np.int64), np.zeros(number, bool)
    for node in record.producer:
        own = np.array(attribute(node, "channels"))
        inside = own >= 0
        for name, target in (("multiple", multiple), ("stays", stays)):
            values = attribute(node, name)
            if values is not None:
                target[own[inside]] = np.array(values)[inside]
    _, which = np.unique(table, axis=0, return_inverse=True)
    for one in dict.fromkeys(which.reshape(-1).tolist()):
        channels = np.flatnonzero(which.reshape(-1) == one)
        entries = int(table[channels[0]].max())
        able = channels[~stays[channels]]
        order = able[np.argsort(sensitivity[able], kind="stable")]
        yield Share(order, len(channels) * entries, entries, int(multiple[channels].max()))


def _counts(node: PruneNode, number: int) -> np.ndarray:
    own = np.array(attribute(node, "channels"))
    counts: np.ndarray = np.bincount(own[own >= 0], minlength=number)
    return counts
