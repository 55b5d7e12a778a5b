"""Counts the memory of the tensors that operations have made and that still live."""

import gc
import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of tensors made inside the context; what a single operation needs does not count.

    The collector is off, so that what only it would free counts as alive.

    Attributes:
        bytes: alive now.
        peak: the most that were alive together.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._known = set()

    def __enter__(self):
        gc.disable()
        return super().__enter__()

    def __exit__(self, *error):
        gc.enable()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _real(x)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if _real(tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self._known.discard(key)
        self.bytes -= size


def _real(x):
    return isinstance(x, Tensor) and x.device.type == "cpu"
