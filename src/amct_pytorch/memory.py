"""Memory that is no longer used goes back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release_memory() -> None:
    """Gives back what the C library holds though it is free; without glibc it does nothing.

    glibc keeps freed blocks of up to 32 MiB for itself. After an export or over a calibration
    they add up to more than a network's weights.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # not Linux, or another C library
        return None
    return trim
