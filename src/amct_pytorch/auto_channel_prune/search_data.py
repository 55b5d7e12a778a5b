"""The samples and labels that sensitivities are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, ModelError
from amct_pytorch.graph.tensors import (
    ModelInputs,
    in_own_precision,
    map_tensors,
    random_state_kept,
    tensors_in,
)
from amct_pytorch.graph.trace import where_it_failed

_ALLOWED = (
    "allowed are [data, label], of which iteration i uses sample i, or a list of test_iteration "
    "pairs [[data, label], …]"
)


@dataclass(frozen=True)
class SearchData:
    """What a user's `input_data` stands for.

    Attributes:
        data: arguments of the forward, of each iteration.
        labels: what each of its outputs should be, of each iteration.
    """

    data: tuple[Any, ...]
    labels: tuple[Any, ...]

    @classmethod
    def of(cls, input_data: Any, test_iteration: int) -> SearchData:
        """The pairs of each iteration.

        Args:
            input_data: see `_ALLOWED`; data and label may each be a tuple of tensors.
            test_iteration: how many pairs are wanted.

        Raises:
            ArgumentTypeError, ArgumentValueError: it is something else, or too little.
        """
        if not isinstance(input_data, (list, tuple)) or not input_data:
            raise ArgumentTypeError(f"input_data is {_shown(input_data)}; {_ALLOWED}")
        if all(_is_pair(item) for item in input_data):
            if len(input_data) < test_iteration:
                raise ArgumentValueError(
                    f"input_data has {len(input_data)} pairs; test_iteration is {test_iteration}, "
                    "so it needs at least as many"
                )
            pairs = input_data[:test_iteration]
            return cls(tuple(data for data, _ in pairs), tuple(label for _, label in pairs))
        if len(input_data) != 2 or not all(_has_tensors(item) for item in input_data):
            raise ArgumentTypeError(f"input_data is {_shown(input_data)}; {_ALLOWED}")
        for what, held in zip(("data", "label"), input_data, strict=True):
            for tensor in tensors_in(held):
                samples = tensor.shape[0] if tensor.dim() else 0
                if samples < test_iteration:
                    raise ArgumentValueError(
                        f"input_data: {what} has {samples} samples (shape "
                        f"{list(tensor.shape)}); test_iteration is {test_iteration}, so it needs "
                        "at least as many"
                    )
        data, label = input_data
        return cls(
            tuple(_sample(data, i) for i in range(test_iteration)),
            tuple(_sample(label, i) for i in range(test_iteration)),
        )

    def inputs(self) -> ModelInputs:
        """Arguments of the first iteration."""
        return ModelInputs.of(self.data[0])

    def pairs(self) -> Iterator[tuple[ModelInputs, list[Tensor]]]:
        """Arguments and labels of each iteration."""
        for data, label in zip(self.data, self.labels, strict=True):
            yield ModelInputs.of(data), list(tensors_in(label))

    def check_labels(self, model: nn.Module) -> None:
        """Runs the model once for each shape of data, and holds outputs against the labels.

        Args:
            model: a copy; in eval mode.

        Raises:
            ArgumentValueError: a label has another shape than the output.
            ModelError: the model cannot be run on the data.
        """
        seen: dict[str, list[tuple[int, ...]]] = {}
        for index, (inputs, labels) in enumerate(self.pairs()):
            key = str(inputs)
            if key not in seen:
                seen[key] = _output_shapes(model, inputs)
            shapes = [tuple(label.shape) for label in labels]
            if shapes != seen[key]:
                raise ArgumentValueError(
                    f"input_data: the label of iteration {index} has shape "
                    f"{_shapes(shapes)} and the model's output {_shapes(seen[key])}; the loss is "
                    "|output - label|, so they must be equal (for classes, give one-hot rows "
                    "or the outputs of a trained model)"
                )


def _output_shapes(model: nn.Module, inputs: ModelInputs) -> list[tuple[int, ...]]:
    try:
        with in_own_precision(model), random_state_kept(model):
            return [tuple(tensor.shape) for tensor in tensors_in(inputs.copied().call(model))]
    except Exception as error:
        raise ModelError(
            f"the model cannot be run on input_data ({inputs}): {type(error).__name__} "
            f"{where_it_failed(model, error.__traceback__)}: {error}"
        ) from error


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and all(map(_has_tensors, item))


def _has_tensors(item: Any) -> bool:
    if not isinstance(item, (Tensor, Mapping, list, tuple)):
        return False
    return next(tensors_in(item), None) is not None


def _sample(held: Any, index: int) -> Any:
    return map_tensors(held, lambda tensor: tensor[index : index + 1])


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes) or "nothing"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        parts = [type(item).__name__ for item in value[:4]]
        return f"a {type(value).__name__} of {len(value)} ({', '.join(parts)}, …)"
    return f"a {type(value).__name__}"
