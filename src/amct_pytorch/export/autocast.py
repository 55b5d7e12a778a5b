"""Leaving a model's own autocast regions out of what is exported."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def autocast_ignored() -> Iterator[None]:
    """While active, ``with torch.autocast(...)`` does nothing in this thread.

    The exporter puts such a region into a graph of its own, in which no node knows its module
    any more. Without it the region is in the precision of its parameters, which is the better
    one. Other threads are not touched.
    """
    thread = threading.get_ident()
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def stay(self: torch.autocast) -> Any:
        return self if threading.get_ident() == thread else enter(self)

    def go(self: torch.autocast, *error: Any) -> Any:
        return None if threading.get_ident() == thread else leave(self, *error)

    torch.autocast.__enter__, torch.autocast.__exit__ = stay, go  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
