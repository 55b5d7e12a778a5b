"""From what a user's data loader yields to the arguments of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from amct_pytorch.errors import ArgumentTypeError, CalibrationError
from amct_pytorch.graph.tensors import ModelInputs, map_tensors
from amct_pytorch.logs import logger


class DistillSampleBase:
    """Base of classes that pick the model's inputs out of a loader's batch."""

    @staticmethod
    def get_model_input_data(batch: Any) -> Any:
        """The model's inputs: a tensor, a tuple or list of tensors, or a dict of keyword inputs.

        Args:
            batch: what the loader yields.
        """
        raise NotImplementedError


def model_inputs(
    loader: Iterable[Any], model: nn.Module, sample: DistillSampleBase | None
) -> Iterator[ModelInputs]:
    """The model's arguments for each batch of a loader, on the model's device.

    Without a `sample`, a batch is taken as `input_data` is: a tensor, a tuple or list, a dict.
    Of a tuple or list the model gets as many entries as its forward takes, of a dict those keys
    that it knows; what is left over (labels) is told once.

    Raises:
        ArgumentTypeError: a batch holds nothing that a model takes.
        CalibrationError: the loader yields no batch.
    """
    anchor = next((t for t in (*model.parameters(), *model.buffers())), None)
    dropped: set[str] = set()
    number = 0
    for number, batch in enumerate(loader, start=1):
        chosen = batch if sample is None else sample.get_model_input_data(batch)
        try:
            inputs = ModelInputs.of(chosen)
        except ArgumentTypeError as error:
            raise ArgumentTypeError(
                f"batch {number} of train_loader is no input of the model: {error}; give a "
                "sample_instance whose get_model_input_data picks the inputs out of it"
            ) from None
        if sample is None:
            inputs, left = _fitting(inputs, model)
            if left - dropped:
                logger.warning(
                    "train_loader: the model's forward does not take %s of a batch; left out",
                    ", ".join(sorted(left - dropped)),
                )
                dropped |= left

        def moved(tensor: Tensor) -> Tensor:
            copied = tensor.detach().clone()
            return copied if anchor is None else copied.to(anchor.device)

        args, kwargs = map_tensors((inputs.args, inputs.kwargs), moved)
        yield ModelInputs(args, kwargs)
    if not number:
        raise CalibrationError("train_loader yields no batch; at least one is needed")


def _fitting(inputs: ModelInputs, model: nn.Module) -> tuple[ModelInputs, set[str]]:
    """The arguments that the forward takes, and names of those that it does not."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = inspect.Parameter
    takes_any = any(p.kind == kinds.VAR_POSITIONAL for p in parameters)
    positions = sum(
        p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD) for p in parameters
    )
    names = {p.name for p in parameters}
    takes_all = any(p.kind == kinds.VAR_KEYWORD for p in parameters)
    args = inputs.args if takes_any else inputs.args[:positions]
    kwargs = {k: v for k, v in inputs.kwargs.items() if takes_all or k in names}
    left = {f"entry {i}" for i in range(len(args), len(inputs.args))}
    left |= {repr(name) for name in inputs.kwargs if name not in kwargs}
    return ModelInputs(args, kwargs), left
