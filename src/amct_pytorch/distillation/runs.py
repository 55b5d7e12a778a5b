"""The teacher's and the student's run on every batch, side by side, from block to block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from amct_pytorch.errors import ModelError
from amct_pytorch.graph.blocks import Block, find_block, only_call
from amct_pytorch.graph.layers import SeenLayer
from amct_pytorch.graph.look import copy_sharing_weights, layer_calls
from amct_pytorch.graph.replay import Answer, Replay
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.graph.trace import OpCall, Trace, trace_forward
from amct_pytorch.nn.intercept import LayerCall
from amct_pytorch.nn.retrain import RetrainLayer
from amct_pytorch.nn.trained_norm import TrainedNorm
from amct_pytorch.spill import Spill

# What stands between blocks is kept on disk where it takes more bytes.
IN_MEMORY = 2**30


@dataclass(frozen=True)
class Part:
    """A block to distill, or a single layer that only gets its first range.

    Attributes:
        layers: those in it, in the order in which they run.
        trained: whether it is distilled.
    """

    layers: tuple[str, ...]
    trained: bool


class Run:
    """Teacher and student on one batch, as far as they have come.

    Attributes:
        blocks: of each part, in the traced run.
        trace: the teacher's run.
    """

    def __init__(
        self,
        trace: Trace,
        blocks: Mapping[Part, Block],
        inputs: ModelInputs,
        teacher: Mapping[str, Tensor],
        student: Mapping[str, Tensor],
        answers: Mapping[int, Answer],
    ) -> None:
        self.trace, self.blocks = trace, blocks
        results = [block.result for part, block in blocks.items() if part.trained]
        self._teacher = Replay(trace, inputs.copied(), teacher, keep=results)
        self._student = Replay(trace, inputs.copied(), student, answers)

    def reach(self, part: Part) -> Tensor | None:
        """Takes the student to the part's first call and the teacher behind its last.

        Returns:
            What the teacher's block makes; None where the part is not distilled.
        """
        block = self.blocks[part]
        self._student.advance(block.begin)
        if not part.trained:
            return None
        self._teacher.advance(block.ops[-1].index + 1)
        return self._teacher.take(block.result)

    def student_output(self, part: Part, *, copied: bool) -> Tensor:
        """What the student's part makes of what the student made before it.

        Args:
            part: the one reached.
            copied: whether its input is copied first, for parts that change it in place.
        """
        block = self.blocks[part]
        entry = self._student.value(block.entry)
        return self._student.run_part(
            block.ops, {block.entry: entry.clone() if copied else entry}, block.result
        )

    def changes_input(self, part: Part) -> bool:
        """Whether the part changes its input in place."""
        block = self.blocks[part]
        entry = self._student.value(block.entry).clone()
        before = entry._version
        self._student.run_part(block.ops, {block.entry: entry}, block.result)
        return entry._version != before

    def own_parameters(self, part: Part) -> list[str]:
        """Names of the parameters and buffers that only the part's calls read."""
        inside = {op.index for op in self.blocks[part].ops}
        names = {value: name for name, value in self.trace.parameter_values.items()}
        read = {v for op in self.trace.ops if op.index in inside for v in op.inputs}
        elsewhere = {v for op in self.trace.ops if op.index not in inside for v in op.inputs}
        return [names[value] for value in sorted(read - elsewhere) if value in names]

    def finish(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of the teacher and of the student."""
        both = []
        for replay in (self._teacher, self._student):
            replay.advance(len(self.trace.ops))
            both.append([replay.value(value) for value in self.trace.outputs])
        return both[0], both[1]

    def held_bytes(self) -> int:
        """Bytes of the tensors between blocks."""
        return self._teacher.held_bytes() + self._student.held_bytes()

    def spill(self, keep: Callable[[Tensor], Tensor]) -> None:
        """Replaces the tensors between blocks by what `keep` makes of them."""
        self._teacher.replace_held(keep)
        self._student.replace_held(keep)


def tensors_by_name(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and buffers of a model under the names that they have in the one traced.

    A layer that stands in for another holds its parameters under the same names.
    """
    found = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), attribute)
        assert isinstance(tensor, Tensor), name
        found[name] = tensor
    return found


def begin(
    teacher: nn.Module,
    student: nn.Module,
    seen: Sequence[SeenLayer],
    layers: Mapping[str, RetrainLayer],
    parts: Sequence[Part],
    batches: Iterable[ModelInputs],
) -> list[Run]:
    """One run a batch, before the first call.

    Args:
        teacher: the float model, in eval mode.
        student: the quantized one.
        seen: layers of the teacher.
        layers: the student's quantized ones, by name.
        parts: what is distilled, and layers that get a range.
        batches: arguments of the model.

    Raises:
        ModelError: a batch cannot be run; values are made where torch functions are not seen;
            or a batch takes another way through the network on which a block is none.
    """
    runs: list[Run] = []
    known: list[tuple[Trace, dict[Part, Block]]] = []
    for number, inputs in enumerate(batches, start=1):
        trace = trace_forward(copy_sharing_weights(teacher), inputs)
        found = next((pair for pair in known if pair[0].ops == trace.ops), None)
        if found is None:
            found = (trace, _blocks(trace, seen, parts, number))
            known.append(found)
        trace, blocks = found
        names = [*trace.parameter_values]
        answers = _answers(trace, layer_calls(trace, seen), layers)
        runs.append(
            Run(
                trace,
                blocks,
                inputs,
                tensors_by_name(teacher, names),
                tensors_by_name(student, names),
                answers,
            )
        )
    return runs


def _answers(
    trace: Trace, calls: Mapping[str, OpCall], layers: Mapping[str, RetrainLayer]
) -> dict[int, Answer]:
    """What answers the calls of the student's quantized layers and of BatchNorms folded in."""
    answers: dict[int, Answer] = {}
    for name, layer in layers.items():
        answers[calls[name].index] = _layer_answer(layer)
        if layer.norm is not None:
            (reader,) = trace.consumers(calls[name].outputs[0])
            answers[reader.index] = _norm_answer(layer.norm)
    return answers


def _layer_answer(layer: RetrainLayer) -> Answer:
    def answer(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return layer.answer(LayerCall.bind(function, args, kwargs))

    return answer


def _norm_answer(norm: TrainedNorm) -> Answer:
    def answer(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if norm.folded else function(*args, **kwargs)

    return answer


def _blocks(
    trace: Trace, layers: Sequence[SeenLayer], parts: Sequence[Part], number: int
) -> dict[Part, Block]:
    if trace.untraced:
        raise ModelError(
            f"batch {number}: the model makes {len(trace.untraced)} tensors where torch functions "
            "are not seen (a torch.autograd.Function, a compiled extension); such a network "
            "cannot be run block by block"
        )
    calls = layer_calls(trace, layers)
    found = {}
    for part in parts:
        missing = [name for name in part.layers if name not in calls]
        if missing:
            raise ModelError(
                f"batch {number}: layer {missing[0]!r} does not run once, as it did on input_data"
            )
        if part.trained:
            found[part] = find_block(trace, calls, part.layers[0], part.layers[-1])
        else:
            found[part] = only_call(calls[part.layers[0]], part.layers)
    return found


class Memory:
    """Keeps what stands between blocks in memory, or on disk where it is much.

    Args:
        to_disk: whether it is on disk in any case.
    """

    def __init__(self, to_disk: bool) -> None:
        self._to_disk = to_disk
        self._spill = Spill("tensors between the blocks of the distillation")

    def settle(self, runs: Sequence[Run]) -> None:
        """To be called when all runs have reached a block."""
        if self._to_disk or sum(run.held_bytes() for run in runs) > IN_MEMORY:
            for run in runs:
                run.spill(self._spill.keep)

    def close(self) -> None:
        """Removes what is on disk."""
        self._spill.close()
