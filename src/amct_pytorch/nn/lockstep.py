"""Several forward passes that wait for each other at every layer.

What a layer becomes may depend on all calibration batches, and on what the layers before it
have become. Passes in lockstep go through the network once: at a layer each pass stops, until
the layer has been dealt with for all of them. Memory is that of the activations that one layer
of depth needs, times the passes; going through the network anew for each layer would take
half a pass a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class _Abandoned(BaseException):
    """Ends a pass that nobody waits for any more; not an Exception, so that no user code stops it.

    Raised in a pass's own thread only.
    """


@dataclass(frozen=True)
class _Modes:
    """What of torch's state belongs to a thread, and a forward may depend on.

    Attributes:
        cuda: the current CUDA device.
        default: the default device.
        autocast: type of device and of numbers where autocast is on.
    """

    cuda: int | None
    default: torch.device
    autocast: tuple[tuple[str, torch.dtype], ...]

    @classmethod
    def of_this_thread(cls) -> _Modes:
        """As it is now."""
        cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        types = ("cpu", "cuda") if cuda is not None else ("cpu",)
        on = [kind for kind in types if torch.is_autocast_enabled(kind)]
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in on)
        return cls(cuda, torch.get_default_device(), autocast)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same in another thread, without gradients."""
        with ExitStack() as stack:
            if self.cuda is not None:
                torch.cuda.set_device(self.cuda)
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            if self.default.type != "cpu":
                stack.enter_context(self.default)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            yield


class _Pass(threading.Thread):
    """One forward pass, which runs only between `resume` and its next stop."""

    def __init__(self, run: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._run = run
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._modes = _Modes.of_this_thread()
        self.waits_at: str | None = None
        self.over = False
        self.abandoned = False
        self.error: BaseException | None = None

    def run(self) -> None:
        """The thread's life."""
        self._go.acquire()
        try:
            if not self.abandoned:
                with self._modes.entered():
                    self._run()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.over, self.waits_at = True, None
        self._stopped.release()

    def resume(self) -> None:
        """Lets the pass run to its next stop, or its end."""
        self.waits_at = None
        self._go.release()
        self._stopped.acquire()

    def stop(self, name: str) -> None:
        """In the pass's thread: waits to be resumed."""
        self.waits_at = name
        self._stopped.release()
        self._go.acquire()
        if self.abandoned:
            raise _Abandoned


class Lockstep(Generic[T]):
    """Runs passes one at a time from layer to layer.

    Args:
        order: the layers; where passes wait at different ones, the first in this order is next.
        solve: called with a layer and what each pass that reached it brought there.
    """

    def __init__(self, order: Sequence[str], solve: Callable[[str, Sequence[T]], None]) -> None:
        self._order: Mapping[str, int] = {name: i for i, name in enumerate(order)}
        self._solve = solve
        self._solved: set[str] = set()
        self._brought: dict[_Pass, T] = {}

    def run(self, passes: Sequence[Callable[[], object]]) -> None:
        """Runs all passes to their end.

        Raises:
            Whatever a pass or `solve` raises.
        """
        threads = [_Pass(run) for run in passes]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                self._resume(thread)
            while waiting := [thread for thread in threads if not thread.over]:
                name = min(
                    {thread.waits_at for thread in waiting if thread.waits_at is not None},
                    key=self._order.__getitem__,
                )
                here = [thread for thread in waiting if thread.waits_at == name]
                self._solve(name, [self._brought.pop(thread) for thread in here])
                self._solved.add(name)
                for thread in here:
                    self._resume(thread)
        finally:
            for thread in threads:
                if not thread.over:
                    thread.abandoned = True
                    thread.resume()
                thread.join()

    def arrive(self, name: str, bring: Callable[[], T]) -> None:
        """In a pass: returns when the layer has been solved.

        Args:
            name: the layer, one of the order.
            bring: makes what `solve` needs of this pass; not called where the layer is solved.
        """
        if name in self._solved:
            return
        thread = threading.current_thread()
        assert isinstance(thread, _Pass)
        self._brought[thread] = bring()
        thread.stop(name)

    def _resume(self, thread: _Pass) -> None:
        thread.resume()
        if thread.error is not None:
            raise thread.error
