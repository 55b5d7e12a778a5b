"""The one opset and IR version that exported models have."""

from __future__ import annotations

import logging
from collections.abc import Collection

import onnx
from onnx import inliner, version_converter

from amct_pytorch.errors import ExportError
from amct_pytorch.export.layer_nodes import layer_of, tag_layer
from amct_pytorch.export.onnx_graph import DEFAULT_DOMAINS
from amct_pytorch.export.stored import with_all_data

OPSET = 18
IR_VERSION = 8
_ASIDE = "amct.aside"
log = logging.getLogger("amct_pytorch")


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the default operator set that a model uses."""
    versions = [o.version for o in model.opset_import if o.domain in DEFAULT_DOMAINS]
    return max(versions, default=0)


def plain_model(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The model without functions, at opset 18 where it can be, and the opset it got.

    A model that needs a newer operator keeps its opset; the log says so.

    Raises:
        ExportError: a node's operator is of no standard domain.
    """
    if model.functions:
        model = inliner.inline_local_functions(with_all_data(model))
    custom = [n for n in model.graph.node if n.domain not in DEFAULT_DOMAINS]
    if custom:
        raise ExportError(
            f"node {custom[0].name!r} has operator {custom[0].domain}.{custom[0].op_type}; "
            "only standard ONNX operators can be exported"
        )
    version = opset_of(model)
    if version == OPSET:
        return model, version
    try:
        converted = version_converter.convert_version(with_all_data(model), OPSET)
        _copy_layer_names(model, converted)
        return converted, OPSET
    except Exception as error:
        if version < OPSET:
            raise ExportError(
                f"the ONNX model has opset {version} and cannot be brought to {OPSET}: {error}"
            ) from error
    log.warning("the ONNX model needs opset %d, newer than %d; it is kept", version, OPSET)
    return model, version


def _copy_layer_names(source: onnx.ModelProto, target: onnx.ModelProto) -> None:
    """Tag the nodes of a converted model; the converter keeps output names, not metadata."""
    layers = {node.output[0]: layer_of(node) for node in source.graph.node if node.output}
    for node in target.graph.node:
        layer = layers.get(node.output[0]) if node.output else None
        if layer is not None:
            tag_layer(node, layer)


def raise_opset(model: onnx.ModelProto, foreign: Collection[str]) -> onnx.ModelProto:
    """The model at opset 18 if it is older, operators named in `foreign` left as they are.

    Raises:
        ExportError: a standard operator cannot be brought to opset 18.
    """
    if opset_of(model) >= OPSET:
        return model
    raised = onnx.ModelProto()
    raised.CopyFrom(model)
    # The converter passes over nodes of domains it does not know.
    for node in raised.graph.node:
        if node.op_type in foreign:
            node.domain = _ASIDE
    raised.opset_import.add(domain=_ASIDE, version=1)
    try:
        raised = version_converter.convert_version(raised, OPSET)
    except Exception as error:
        raise ExportError(
            f"the model has opset {opset_of(model)} and cannot be brought to {OPSET}: {error}"
        ) from error
    for node in raised.graph.node:
        if node.domain == _ASIDE:
            node.ClearField("domain")
    kept = [o for o in raised.opset_import if o.domain != _ASIDE]
    del raised.opset_import[:]
    raised.opset_import.extend(kept)
    return raised
