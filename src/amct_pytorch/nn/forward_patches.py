"""Changes to what calling a module does, each undone at the end of its context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class StopForward(Exception):
    """Ends a forward pass that has done what it was for.

    Its arguments are what the pass has left behind: the output of the module it ended at.
    """


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a tensor, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


@contextmanager
def returning(module: nn.Module, output: Any) -> Iterator[None]:
    """The module returns `output` without running."""
    with forwarded(module, lambda *args, **kwargs: output):
        yield


@contextmanager
def forwarded(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module's forward is `forward`; its hooks run as before."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def watched(module: nn.Module, see: Callable[[Any], object]) -> Iterator[None]:
    """`see` is called with the module's first argument before each call."""
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: (see(first_argument(args, kwargs)), None)[1], with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def stopped_after(module: nn.Module, keep: Callable[[Any], object]) -> Iterator[None]:
    """The forward pass ends when the module returns; `keep` is called with its output."""

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        keep(output)
        raise StopForward(output)

    handle = module.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def attribute(target: object, name: str, value: Any) -> Iterator[None]:
    """`target.name` is `value`."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first positional argument of a call, or else its first keyword argument."""
    return args[0] if args else next(iter(kwargs.values()), None)
