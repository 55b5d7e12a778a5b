"""A documented import path that is also the function: `distill(...)` and `distill.distill_sample`.

``amct_pytorch.distill`` becomes this package as soon as something imports a module of it, so the
package itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from amct_pytorch.distill.distill_sample import DistillSampleBase

__all__ = ["DistillSampleBase"]


class _Callable(ModuleType):
    """A module that is called like the function `flows.distillation.distill`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from amct_pytorch.flows.distillation import distill

        return distill(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
