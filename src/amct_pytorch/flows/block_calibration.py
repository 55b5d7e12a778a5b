"""Calibration of a model block by block, for models whose activations do not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from amct_pytorch.algorithms.padding import padding_mask
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    ModelError,
)
from amct_pytorch.flows.arguments import public_call
from amct_pytorch.flows.block_search import Blocks, find_blocks
from amct_pytorch.low_bit.base_module import BaseQuantizeModule
from amct_pytorch.nn.forward_patches import (
    StopForward,
    attribute,
    call,
    forwarded,
    returning,
    stopped_after,
    watched,
)


@public_call
def calibrate_blocks(
    model: nn.Module,
    inputs: Iterable[Any],
    blocks: str | Sequence[str] | None = None,
    *,
    follow_float: bool = True,
) -> None:
    """Calibrates a model that `quantize` has instrumented, one block after the other; in place.

    The batches run through the first block until its layers have their factors, then the
    block's quantized outputs are the inputs of the second one, and so on. Beside the model,
    memory holds the inputs and outputs of one block at a time. The model's own forward calls
    the blocks, with the masks and position embeddings it gives them; only one of them runs.

    ====================== =============================== ===================================
    layers                 forward passes through a block  memory beside the model
    ====================== =============================== ===================================
    minmax, awq, …         2: observe, output              block inputs, statistics
    gptq                   about 3 with several batches    block inputs, Hessians
                           (each layer waits for those
                           before it), 1 with one batch
    gptq, `follow_float`   the same and as many in float   twice the block inputs, Hessians
                           (2 with one batch)              twice, float inputs of the block's
                                                           layers for one batch
    ====================== =============================== ===================================

    Batches of equal shape keep memory low; a single one saves passes, and needs the memory of a
    block's forward pass over all of it.

    Args:
        model: what `quantize` has changed.
        inputs: the calibration batches, as many as the config's `batch_num` or more. Each is
            what the model's forward takes: a tensor, a tuple or list, or a dict of keyword
            arguments. An `attention_mask` [batch, sequence] in a dict leaves padding out.
        blocks: name of the container of the blocks, or the names of the blocks in order; None:
            the container with the most layers to calibrate. The first thing that a block
            returns is the next block's input.
        follow_float: GPTQ layers make up for what quantized layers before have done to their
            input, as far as a change of their weights can.

    Raises:
        ArgumentTypeError: if `model` is no module.
        ArgumentValueError: for no inputs, unknown blocks, or a model without layers to
            calibrate.
        CalibrationError: if a layer is not calibrated by these inputs.
        ModelError: if the model does not call its blocks one after the other.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model is a {type(model).__name__}; allowed is torch.nn.Module")
    if isinstance(inputs, Tensor | str | bytes | Mapping) or not isinstance(inputs, Iterable):
        raise ArgumentTypeError(
            f"inputs is a {type(inputs).__name__}; allowed is a list, or anything to iterate over, "
            "with a batch in each entry"
        )
    if not isinstance(follow_float, bool):
        raise ArgumentTypeError(f"follow_float is {follow_float!r}; allowed are True and False")
    batches = list(inputs)
    if not batches:
        raise ArgumentValueError("inputs has no batch; give at least one")
    if not _pending(model):
        raise ArgumentValueError("model has no layer to calibrate; call quantize(model) first")
    chain = find_blocks(model, blocks, lambda module: len(_pending(module)))
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _caches_off(model):
            _Pipeline(model, batches, chain, follow_float).run()
    finally:
        for module, flag in training.items():
            module.training = flag


class _Pipeline:
    """The batches on their way through the blocks.

    Args:
        model: the model.
        batches: what its forward takes, one entry a batch.
        chain: names and blocks in order.
        follow_float: whether the float model's activations are followed too.
    """

    def __init__(
        self, model: nn.Module, batches: list[Any], chain: Blocks, follow_float: bool
    ) -> None:
        self._model = model
        self._batches = batches
        self._chain = chain
        # What the block before has returned for each batch: behind quantized blocks, and in the
        # float model as long as a layer is left that wants to know.
        self._outputs: list[Any] = [None] * len(batches)
        self._plain: list[Any] = [None] * len(batches)
        followers = [i for i, (_, block) in enumerate(chain) if _followers(block)]
        self._last_followed = max(followers, default=-1) if follow_float else -1

    def run(self) -> None:
        """Calibrates everything."""
        for index in range(len(self._chain)):
            self._calibrate_block(index)
        if _pending(self._model):
            for number in range(len(self._batches)):
                self._forward(number, len(self._chain), self._outputs)
        self._complain(self._model)

    def _calibrate_block(self, index: int) -> None:
        block = self._chain[index][1]
        in_order = any(getattr(module, "sequential", False) for module in _pending(block))
        at_once = in_order and len(self._batches) == 1
        # The block's float weights stay until it is done; the next blocks' are still the model's.
        floats = _float_layers(block) if index <= self._last_followed else {}
        while pending := _pending(block):
            for number in range(len(self._batches)):
                waiting = pending if in_order and not at_once else []
                references = self._references(index, number, floats, waiting)
                with ExitStack() as changes:
                    changes.enter_context(_stopped_at_second_input(waiting))
                    for module, meant in references.items():
                        changes.enter_context(attribute(module, "reference", meant))
                    if at_once:
                        for module in pending:
                            if hasattr(module, "quantized_at_once"):
                                changes.enter_context(attribute(module, "quantized_at_once", True))
                    output = self._forward(number, index, self._outputs)
                references.clear()
            if len(_pending(block)) == len(pending):
                self._complain(block)
        for number in range(len(self._batches)):
            if not at_once:
                output = self._forward(number, index, self._outputs)
            self._outputs[number] = output
            if index < self._last_followed:
                with _float(floats):
                    self._plain[number] = self._forward(number, index, self._plain)
        if index == self._last_followed:
            self._plain.clear()

    def _references(
        self, index: int, number: int, floats: _FloatLayers, waiting: Sequence[Any]
    ) -> dict[Any, Tensor]:
        """What layers that follow the float model would get from it for one batch.

        They are computed anew for each batch: those of all batches together would be several
        times the block's inputs.

        Args:
            index: the block's.
            number: the batch's.
            floats: the float layers of the block; none if nothing is to be followed.
            waiting: layers of which only those on the first input are wanted.

        Returns:
            The input of each layer that is still to be calibrated. A layer that was not called
            just once has none.
        """
        block = self._chain[index][1]
        seen: dict[Any, list[Tensor]] = {module: [] for module in _followers(block)}
        if not floats or not seen:
            return {}
        with ExitStack() as changes:
            changes.enter_context(_float(floats))
            changes.enter_context(_stopped_at_second_input(waiting))
            for module, inputs in seen.items():
                changes.enter_context(watched(module, inputs.append))
            self._forward(number, index, self._plain)
        return {module: inputs[0] for module, inputs in seen.items() if len(inputs) == 1}

    def _forward(self, number: int, index: int, outputs: list[Any]) -> Any:
        """What block `index` returns for a batch; None if the forward was stopped before.

        The model's own forward is called. Blocks before `index` return what is in `outputs`,
        and the forward ends behind block `index`; with an index behind the last it runs to the
        end.
        """
        batch = self._batches[number]
        result: list[Any] = []
        with ExitStack() as changes:
            called: list[Any] = []
            for _, block in self._chain[:index]:
                changes.enter_context(returning(block, outputs[number]))
            if index:
                changes.enter_context(watched(self._chain[index - 1][1], called.append))
            if index < len(self._chain):
                changes.enter_context(stopped_after(self._chain[index][1], result.append))
            changes.enter_context(padding_mask(_mask_of(batch)))
            try:
                call(self._model, batch)
            except StopForward:
                if index and not called:
                    raise ModelError(
                        f"{self._chain[index - 1][0]}: the model's forward calls "
                        f"{self._chain[index][0]} before this block; name blocks in the order in "
                        "which they are called, and quantize the model anew"
                    ) from None
                return result[0] if result else None
        if index < len(self._chain):
            raise ModelError(
                f"{self._chain[index][0]}: the model's forward did not call this block; name in "
                "blocks those that it calls one after the other"
            )
        return None

    def _complain(self, module: nn.Module) -> None:
        """Raises an error if layers of a module are not calibrated."""
        names = {id(m): name for name, m in self._model.named_modules()}
        left = [names[id(m)] for m in _pending(module)]
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise CalibrationError(
                f"{', '.join(left[:5])}{more}: not calibrated by {len(self._batches)} batches; "
                "give at least batch_num batches that each reach these layers"
            )


def _pending(module: nn.Module) -> list[Any]:
    """The layers in a module that are still to be calibrated."""
    return [m for m in module.modules() if isinstance(m, BaseQuantizeModule) and not m.calibrated]


def _followers(module: nn.Module) -> list[Any]:
    """Those of them that want to know their input in the float model.

    None if a layer among them cannot be made to compute its float output.
    """
    pending = _pending(module)
    if not all(isinstance(getattr(m, "ori_module", None), nn.Module) for m in pending):
        return []
    return [m for m in pending if hasattr(m, "reference")]


# Layers under calibration and the float layers that they stand for.
_FloatLayers = dict[Any, nn.Module]


def _float_layers(block: nn.Module) -> _FloatLayers:
    """The float layers of a block; none if it has no layer that follows the float model."""
    return {m: m.ori_module for m in _pending(block)} if _followers(block) else {}


@contextmanager
def _float(layers: _FloatLayers) -> Iterator[None]:
    """The layers compute their float outputs and nothing else, calibrated or not."""
    seen = {module: module.batches_seen for module in layers}
    try:
        with ExitStack() as changes:
            for module, layer in layers.items():
                changes.enter_context(forwarded(module, layer.forward))
            yield
    finally:
        for module, count in seen.items():
            module.batches_seen = count


@contextmanager
def _stopped_at_second_input(modules: Sequence[Any]) -> Iterator[None]:
    """The forward pass ends before a module is called with another tensor than the first was."""
    first: list[Any] = []

    def see(x: Any) -> None:
        if first and x is not first[0]:
            raise StopForward
        first[:] = [x]

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(watched(module, see))
        yield


@contextmanager
def _caches_off(model: nn.Module) -> Iterator[None]:
    """Language models keep no keys and values, which only generation needs."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is True:
        with attribute(config, "use_cache", False):
            yield
    else:
        yield


def _mask_of(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
