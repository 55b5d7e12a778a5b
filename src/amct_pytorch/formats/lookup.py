"""Constant tables that are indexed by tensors."""

from __future__ import annotations

from torch import Tensor


class LookupTable:
    """A constant vector, copied once to each device that it is used on.

    Args:
        values: one dimension, on the CPU.
    """

    def __init__(self, values: Tensor) -> None:
        self._by_device = {values.device: values}

    def __getitem__(self, index: Tensor) -> Tensor:
        """The values at `index` (any integer dtype, any shape), in its shape, on its device."""
        values = self._by_device.get(index.device)
        if values is None:
            values = next(iter(self._by_device.values())).to(index.device)
            self._by_device[index.device] = values
        # Several times faster than values[index] on CPUs.
        return values.index_select(0, index.reshape(-1).int()).reshape(index.shape)
