"""What flows between the operators of an imported model.

Data are torch tensors. Sizes, axes and what is computed from them are *host values*: numpy
arrays, of int64, or of objects where an exporter hands out symbolic sizes. So a reshape by
computed sizes is plain Python for whoever traces the module, and a batch axis stays dynamic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Value = Tensor | np.ndarray | None


def host(value: Value) -> np.ndarray:
    """A value as numpy array; of a tensor, its data is read."""
    if isinstance(value, np.ndarray):
        return value
    assert isinstance(value, Tensor)
    array: np.ndarray = value.detach().cpu().numpy()
    return array


def host_array(items: Any) -> np.ndarray:
    """An array of whole numbers, which may be symbolic ones."""
    array = np.array(items, dtype=object)
    if all(isinstance(item, (int, np.integer)) for item in array.flat):
        return array.astype(np.int64)
    return array


def integers(value: Value) -> list[Any]:
    """The whole numbers of a value, in order, as Python (or symbolic) integers."""
    return [item.item() if isinstance(item, np.generic) else item for item in host(value).flat]


def scalar(value: Value) -> Any:
    """The one number of a value, as Python number."""
    return host(value).reshape(-1)[0].item()


def tensor(value: Value, device: torch.device | None = None) -> Tensor:
    """A value as tensor."""
    if isinstance(value, Tensor):
        return value
    assert value is not None
    if value.dtype != object:
        return torch.from_numpy(np.array(value)).to(device)
    parts = [torch.scalar_tensor(item, dtype=torch.int64, device=device) for item in value.flat]
    return torch.stack(parts).reshape(value.shape)
