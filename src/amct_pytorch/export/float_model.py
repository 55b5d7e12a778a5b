"""The float ONNX model that every other file is made from.

Exported without the exporter's own optimisation, which would fuse by its own rules and lose
which node belongs to which layer; the few passes wanted are run here after each layer's node
has been tagged with the layer's name.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as ir_passes
from torch import Tensor, nn

from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError, ExportError, did_you_mean
from amct_pytorch.export.autocast import autocast_ignored
from amct_pytorch.export.layer_nodes import LAYER_KEY
from amct_pytorch.export.widen import widen
from amct_pytorch.graph.look import copy_sharing_weights
from amct_pytorch.graph.tensors import ModelInputs, in_own_precision, tensors_in
from amct_pytorch.graph.trace import Trace
from amct_pytorch.nn.wrapped import INNER, CompressedLayer, compressed_layers

OPSET = 18
IR_VERSION = 10
SCOPES_KEY = "pkg.torch.onnx.name_scopes"

DynamicAxes = Mapping[str, Mapping[int, str]] | Mapping[str, Sequence[int]]


def check_names(
    inputs: ModelInputs,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamic_axes: DynamicAxes | None,
    taken: Collection[str] = (),
) -> None:
    """Checks what the user said of the ONNX model's inputs and outputs.

    Args:
        inputs: the example arguments.
        input_names: as given.
        output_names: as given.
        dynamic_axes: as given.
        taken: names that weights will have.

    Raises:
        ArgumentTypeError, ArgumentValueError: naming the argument, the value, what is allowed.
    """
    for argument, names in (("input_names", input_names), ("output_names", output_names)):
        _check_name_list(argument, names, taken)
    both = set(input_names or ()) & set(output_names or ())
    if both:
        raise ArgumentValueError(
            f"output_names has {min(both)!r}, which is in input_names too; each tensor needs a "
            "name of its own"
        )
    tensors = list(tensors_in((inputs.args, inputs.kwargs)))
    if input_names is not None and len(input_names) > len(tensors):
        raise ArgumentValueError(
            f"input_names has {len(input_names)} names; input_data has {len(tensors)} tensors"
        )
    if dynamic_axes is None:
        return
    if not isinstance(dynamic_axes, Mapping):
        raise ArgumentTypeError(
            f"dynamic_axes is a {type(dynamic_axes).__name__}; allowed is a dict "
            "{name: {axis: label}} or {name: [axes]}, or None"
        )
    known = [*(input_names or ()), *(output_names or ())]
    ranks = {name: t.dim() for name, t in zip(input_names or (), tensors, strict=False)}
    for name, axes in dynamic_axes.items():
        if name not in known:
            raise ArgumentValueError(
                f"dynamic_axes names {name!r}, which is neither in input_names nor in "
                f"output_names{did_you_mean(name, known)}"
            )
        _check_axes(name, axes, ranks.get(name))


def _check_name_list(argument: str, names: Sequence[str] | None, taken: Collection[str]) -> None:
    if names is None:
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(f"{argument} is {names!r}; allowed is a list of str, or None")
    if len(set(names)) != len(names):
        raise ArgumentValueError(f"{argument} is {names!r}; each name may stand in it once")
    for name in names:
        if not name:
            raise ArgumentValueError(f"{argument} has an empty name: {names!r}")
        if name in taken:
            raise ArgumentValueError(f"{argument} has {name!r}, which is the name of a weight")


def _check_axes(name: str, axes: object, rank: int | None) -> None:
    if not isinstance(axes, (Mapping, list, tuple)):
        raise ArgumentTypeError(
            f"dynamic_axes[{name!r}] is {axes!r}; allowed is {{axis: label}} or [axes]"
        )
    for axis in axes:
        if not isinstance(axis, int) or isinstance(axis, bool) or axis < 0:
            raise ArgumentValueError(
                f"dynamic_axes[{name!r}] has the axis {axis!r}; allowed are integers >= 0"
            )
        if rank is not None and axis >= rank:
            raise ArgumentValueError(
                f"dynamic_axes[{name!r}] has the axis {axis}; the tensor is {rank}-D, so allowed "
                f"are 0 to {rank - 1}"
            )
        if isinstance(axes, Mapping) and not (isinstance(axes[axis], str) and axes[axis]):
            raise ArgumentTypeError(
                f"dynamic_axes[{name!r}][{axis}] is {axes[axis]!r}; allowed is a label, a str"
            )


def check_output_count(output_names: Sequence[str] | None, number: int) -> None:
    """Checks that there are no more names than the model has outputs.

    Raises:
        ArgumentValueError: there are.
    """
    if output_names is not None and len(output_names) > number:
        raise ArgumentValueError(
            f"output_names has {len(output_names)} names; the model returns {number} tensors"
        )


def export_float(
    model: nn.Module,
    inputs: ModelInputs,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
) -> onnx.ModelProto:
    """The instrumented model as float ONNX, each layer's node tagged ``amct.layer``.

    Args:
        model: in eval mode, with `CompressedLayer`s that have no stage.
        inputs: example arguments.
        input_names: names of the tensors in `inputs`, in order; checked by `check_names`.
        output_names: names of the model's output tensors, in order.
        dynamic_axes: axes of named inputs (and outputs) that are not fixed.

    Raises:
        ExportError: the model cannot be exported; the message says where and what to try.
    """
    try:
        # A copy: tracing runs the forward, which may change buffers and attributes.
        with _quiet(), in_own_precision(model), autocast_ignored():
            program = torch.onnx.export(
                _returning_tensors(copy_sharing_weights(model)),
                _growable(inputs, input_names, dynamic_axes).args,
                kwargs=inputs.kwargs or None,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=list(input_names) if input_names else None,
                output_names=list(output_names) if output_names else None,
                dynamic_axes=dynamic_axes,
                verbose=False,
            )
    except Exception as error:
        reason = _first_cause(error)
        raise ExportError(
            f"the model cannot be exported to ONNX: {reason}. torch.onnx.export(model, "
            f"input_data, dynamo=True) has to work{_hint(reason)}"
        ) from error
    assert program is not None
    exported = program.model
    # No runtime at hand computes in bfloat16; float32 holds all of its values.
    widen(exported, {ir.DataType.BFLOAT16}, borders=False)
    layers = compressed_layers(model)
    _tag_layers(exported, layers)
    onnxscript.optimizer.fold_constants(exported)
    ir_passes.IdentityEliminationPass()(exported)
    ir_passes.RemoveUnusedNodesPass()(exported)
    _fold_pads(exported)
    ir_passes.LiftConstantsToInitializersPass()(exported)
    ir_passes.RemoveUnusedNodesPass()(exported)
    _name_weights(exported, layers)
    _drop_exporter_notes(exported)
    exported.ir_version = IR_VERSION
    exported.producer_name = "amct_pytorch"
    proto = ir.to_proto(exported)
    assert isinstance(proto, onnx.ModelProto)
    return proto


def _returning_tensors(model: nn.Module) -> nn.Module:
    """`model`, made to return a flat tuple of its output tensors.

    The exporter does not know the user's own output classes.
    """
    forward = model.forward

    @functools.wraps(forward)
    def flat(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(tensors_in(forward(*args, **kwargs)))

    # Of the bound method: one that the function itself carries would count `self`.
    flat.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = flat
    return model


def check_exportable(trace: Trace) -> None:
    """Refuses what torch's exporter gets wrong without saying so.

    Raises:
        ExportError: naming the module whose forward does it.
    """
    for op in trace.ops:
        divisor = op.argument(6, "divisor_override") if op.function == "avg_pool2d" else None
        if divisor is not None:
            where = op.scopes[-1] if op.scopes else "the model's forward"
            raise ExportError(
                f"{where}: avg_pool2d with divisor_override {divisor} cannot be exported: ONNX has "
                "no such divisor; leave it out and multiply by "
                "kernel area / divisor_override behind the pool"
            )


def _hint(reason: str) -> str:
    """What usually lies behind an exporter's complaint."""
    if "data-dependent" in reason or "GuardOnDataDependent" in reason:
        return "; the forward has Python control flow that depends on the values of tensors"
    if "same dtype" in reason or "should be the same" in reason:
        return (
            "; the model is exported without its own torch.autocast regions, so its forward must "
            "not rely on them to bring operands to one type"
        )
    if "SyntaxError" in reason:
        return "; a module's name is probably a Python keyword or holds a quote"
    return ""


def _growable(
    inputs: ModelInputs, names: Sequence[str] | None, dynamic_axes: DynamicAxes | None
) -> ModelInputs:
    """`inputs` with at least two entries along each dynamic axis.

    torch.export takes a size of 1 for a constant even where the axis is declared dynamic.
    """
    if not dynamic_axes or not names:
        return inputs
    args: list[Any] = list(inputs.args)
    for i, name in enumerate(names[: len(args)]):
        if isinstance(args[i], Tensor):
            for axis in dynamic_axes.get(name, ()):
                if axis < args[i].dim() and args[i].shape[axis] == 1:
                    args[i] = torch.cat([args[i], args[i]], dim=axis)
    return ModelInputs(tuple(args), inputs.kwargs)


def _first_cause(error: BaseException) -> str:
    """The innermost exception's class and first line: what the exporter itself stumbled on."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's notes on missing optional packages off the user's console."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tag_layers(model: ir.Model, layers: Mapping[str, CompressedLayer]) -> None:
    """Writes each layer's name on the one node that its call became.

    A node knows the modules whose forward it came from; a compressed layer makes exactly one
    call, so the node of the right type inside it is the layer's.
    """
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]"))
        owners = [scope for scope in scopes if scope in layers]
        if owners and node.op_type in layers[owners[-1]].kind.onnx_ops:
            name = owners[-1]
            if name in found:
                raise ExportError(
                    f"layer {name!r} became two nodes of the ONNX model ({found[name].name!r} "
                    f"and {node.name!r}); skip it in the config"
                )
            found[name] = node
            node.metadata_props[LAYER_KEY] = name
    missing = [name for name in layers if name not in found]
    if missing:
        raise ExportError(
            f"no node of the ONNX model belongs to {', '.join(map(repr, missing))}: the "
            "exporter left the layer out or merged it; skip it in the config"
        )


def _fold_pads(model: ir.Model) -> None:
    """Moves a constant zero padding of the spatial axes into the convolution behind it.

    Exact: a quantized zero is the offset, with which the convolution pads.
    """
    for node in list(model.graph):
        if node.op_type != "Conv" or node.inputs[0] is None:
            continue
        pad = node.inputs[0].producer()
        if pad is None or pad.op_type != "Pad" or not _pads_zeros(pad):
            continue
        amounts = _constant(pad.inputs[1])
        source = pad.inputs[0]
        if amounts is None or (len(pad.inputs) > 3 and pad.inputs[3] is not None) or source is None:
            continue
        rank = amounts.size // 2
        begin, end = amounts[:rank], amounts[rank:]
        automatic = node.attributes.get_string("auto_pad", "NOTSET") or "NOTSET"
        if begin[:2].any() or end[:2].any() or (amounts < 0).any() or automatic != "NOTSET":
            continue
        own = np.array(node.attributes.get_ints("pads", None) or [0] * (2 * (rank - 2)))
        total = own + np.concatenate([begin[2:], end[2:]])
        node.attributes.add(ir.AttrInt64s("pads", [int(p) for p in total]))
        node.replace_input_with(0, source)


def _pads_zeros(pad: ir.Node) -> bool:
    if (pad.attributes.get_string("mode", "constant") or "constant") != "constant":
        return False
    if len(pad.inputs) < 3 or pad.inputs[2] is None:
        return True
    value = _constant(pad.inputs[2])
    return value is not None and not value.any()


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """What a constant value holds, or None."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _name_weights(model: ir.Model, layers: Mapping[str, CompressedLayer]) -> None:
    """Gives weights the names they have in the user's model."""
    initializers = model.graph.initializers
    for name in layers:
        for parameter in ("weight", "bias"):
            held = initializers.get(f"{name}.{INNER}.{parameter}")
            if held is not None and f"{name}.{parameter}" not in initializers:
                held.name = f"{name}.{parameter}"
    for node in model.graph:
        # A MatMul reads a transposed copy, which constant folding has made.
        layer, weight = node.metadata_props.get(LAYER_KEY), node.inputs[1:2]
        if layer is None or not weight or weight[0] is None or len(weight[0].uses()) != 1:
            continue
        if weight[0].is_initializer() and f"{layer}.weight" not in initializers:
            weight[0].name = f"{layer}.weight"


def _drop_exporter_notes(model: ir.Model) -> None:
    """Removes what the exporter wrote about its own work, machine paths included."""
    for node in model.graph:
        node.doc_string = None
        for key in [key for key in node.metadata_props if key != LAYER_KEY]:
            del node.metadata_props[key]
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = None
