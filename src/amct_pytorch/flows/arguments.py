"""Other spellings under which the public calls accept their arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from amct_pytorch.errors import ArgumentTypeError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")

# The interface's own misspellings, and the names its samples use, by documented name.
OTHER_SPELLINGS = {
    "modfied_onnx_file": ("modified_onnx_file", "modified_onnx_model"),
    "config_defination": ("config_definition",),
    "pth_file": ("save_pth_path",),
}


def public_call(function: Callable[P, R]) -> Callable[P, R]:
    """Makes `function` accept the other spellings of its keywords and explain wrong ones."""
    parameters = inspect.signature(function).parameters
    documented = {other: name for name in parameters for other in OTHER_SPELLINGS.get(name, ())}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        renamed = {}
        for name, value in kwargs.items():
            target = documented.get(name, name)
            if target in renamed or (target != name and target in kwargs):
                raise ArgumentTypeError(
                    f"{function.__name__}() got {target!r} twice, once spelled {name!r}"
                )
            if target not in parameters:
                raise ArgumentTypeError(
                    f"{function.__name__}() has no argument {name!r}"
                    f"{did_you_mean(name, parameters)}; it has {', '.join(parameters)}"
                )
            renamed[target] = value
        try:
            inspect.signature(function).bind(*args, **renamed)
        except TypeError as error:
            raise ArgumentTypeError(f"{function.__name__}(): {error}") from None
        return function(*args, **renamed)  # type: ignore[arg-type]

    return call
