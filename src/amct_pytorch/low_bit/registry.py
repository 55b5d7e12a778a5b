"""The algorithms that `quantize` knows, by name and class of the layer they replace."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from torch import nn

from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, did_you_mean
from amct_pytorch.logs import logger
from amct_pytorch.low_bit.base_module import BaseQuantizeModule


@dataclass(frozen=True)
class Algorithm:
    """How layers of one class are quantized under one name.

    Attributes:
        name: as in a config's ``algorithm``.
        src_op: class name of the layers.
        quant_op: constructed as ``quant_op(ori_module, layer_name, quant_config)``.
        deploy_op: constructed as ``deploy_op(quant_module)``; None: the quantize module stays.
    """

    name: str
    src_op: str
    quant_op: type[BaseQuantizeModule]
    deploy_op: type[nn.Module] | None

    @property
    def built_in(self) -> bool:
        """Whether it came with this package, so that the table of combinations holds for it."""
        return self.quant_op.__module__.startswith(f"{__package__}.")


class Registry:
    """Algorithms by (name, src_op)."""

    def __init__(self) -> None:
        self._algorithms: dict[tuple[str, str], Algorithm] = {}

    def register(self, name: object, src_op: object, quant_op: object, deploy_op: object) -> None:
        """Adds an algorithm; over one of the same name and layer class with a warning.

        Raises:
            ArgumentTypeError: see `algorithm_register`.
            ArgumentValueError: a name is empty.
        """
        for what, value in (("name", name), ("src_op", src_op)):
            if not isinstance(value, str):
                raise ArgumentTypeError(f"{what} is of type {type(value).__name__}; allowed is str")
            if not value:
                raise ArgumentValueError(f"{what} is empty")
        assert isinstance(name, str) and isinstance(src_op, str)
        if not (inspect.isclass(quant_op) and issubclass(quant_op, BaseQuantizeModule)):
            raise ArgumentTypeError(
                f"quant_op is {quant_op!r}; allowed is a subclass of BaseQuantizeModule"
            )
        if deploy_op is not None and not (
            inspect.isclass(deploy_op) and issubclass(deploy_op, nn.Module)
        ):
            raise ArgumentTypeError(
                f"deploy_op is {deploy_op!r}; allowed are a subclass of torch.nn.Module and None"
            )
        if not hasattr(nn, src_op):
            layers = [one for one in vars(nn) if one[0].isupper()]
            # One or two letters apart. The Conv1D of transformers is a class of its own.
            close = difflib.get_close_matches(src_op, layers, n=1, cutoff=0.8)
            if close and close[0].lower() != src_op.lower():
                logger.warning(
                    "src_op %r of algorithm %r is no layer class of torch.nn%s; only layers of a "
                    "class of yours with that very name will be replaced",
                    src_op, name, did_you_mean(src_op, close),
                )  # fmt: skip
        key = (name, src_op)
        known = self._algorithms.get(key)
        if known is not None:
            logger.warning(
                "algorithm %r for %s was %s and is now %s",
                name, src_op, known.quant_op.__qualname__, quant_op.__qualname__,
            )  # fmt: skip
        self._algorithms[key] = Algorithm(name, src_op, quant_op, deploy_op)

    def __iter__(self) -> Iterator[Algorithm]:
        return iter(self._algorithms.values())

    def find(self, name: str, src_op: str) -> Algorithm | None:
        """The algorithm of that name for layers of that class."""
        return self._algorithms.get((name, src_op))

    def layers_of(self, name: str) -> list[str]:
        """Class names of the layers that an algorithm covers."""
        return [algorithm.src_op for algorithm in self if algorithm.name == name]

    def options(self) -> dict[str, type[BaseModel] | None]:
        """Model of the options of each algorithm, by name."""
        return {algorithm.name: algorithm.quant_op.Options for algorithm in self}


REGISTRY = Registry()
