"""Which of the toolkit's files a file is, and what is in it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amct_pytorch.errors import (
    AmctError,
    ConfigError,
    ExportError,
    FileAccessError,
    FileMissingError,
)
from amct_pytorch.files import text_kind


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        kind: what it is, in words.
        columns: of the table.
        rows: of the table.
        facts: what concerns the whole file.
    """

    kind: str
    columns: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def contents_of(path: Path) -> Contents:
    """What is in a file of any kind that the toolkit writes or reads.

    Raises:
        FileMissingError, FileAccessError: it cannot be read.
        AmctError: it is of a known kind and damaged, or of no known kind.
    """
    if not path.exists():
        raise FileMissingError(f"FILE: there is no file {str(path)!r}")
    if path.is_dir():
        raise FileAccessError(f"FILE: {str(path)!r} is a folder; give a file")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise FileAccessError(f"FILE: cannot read {str(path)!r}: {error.strerror}") from error
    if path.suffix == ".safetensors" or head[8:10] == b'{"':
        return _safetensors(path)
    which = text_kind(head)
    if which is not None:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        return _json(path, text) if which == "JSON" else _protobuf_text(path, text)
    try:
        return _onnx(path)
    except ExportError as error:
        if path.suffix == ".onnx":
            raise
        raise ConfigError(
            f"{path} is none of the files that amct knows (as ONNX: {error})"
        ) from error


# --- JSON ----------------------------------------------------------------------------------------


def _json(path: Path, text: str) -> Contents:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    from amct_pytorch.report.html.write import ledger_problem

    if ledger_problem(document) is None:
        return _ledger(document)
    if isinstance(document, dict):
        if set(document) == {"preprocessing"}:
            return Contents("preprocessing of images", facts=dict(document["preprocessing"]))
        if "kv_cache_quant" in json.dumps(document)[:100_000] or _has(document, "quant_algo"):
            return _blocks(document, "KV-cache config")
        if _has(document, "activation_quant_params") or "activation_offset" in document:
            return _calibration_config(document)
        if _has(document, "retrain_data_config") or _has(document, "retrain_enable"):
            return _blocks(document, "config of quantization-aware training")
        if "group" in document or _has(document, "distill_group"):
            return _blocks(document, "config of distillation")
        if {"amct", "command"} <= set(document):
            facts = {k: v for k, v in document.items() if not isinstance(v, (dict, list))}
            return Contents("output of amct --json", facts=facts)
        if any(isinstance(value, dict) for value in document.values()):
            return _blocks(document, "JSON config")
    if isinstance(document, list) and document:
        if all(isinstance(item, dict) and "ori_layer_info" in item for item in document):
            return _decomposition(document)
        if all(isinstance(item, list) and len(item) == 2 for item in document):
            rows = [(str(name), score) for name, score in document]
            return Contents("ranking of layers, most sensitive first", ("layer", "score"), rows)
    raise ConfigError(f"{path} is JSON, but none that amct writes")


def _has(document: dict[str, Any], key: str) -> bool:
    return any(isinstance(value, dict) and key in value for value in document.values())


def _ledger(document: dict[str, Any]) -> Contents:
    layers = document["layers"]
    known = ("type", "status", "sqnr_db", "cosine", "error", "channels", "parameters", "kept")
    keys = [key for key in known if any(layer.get(key) is not None for layer in layers)]
    rows = []
    for layer in layers:
        told = "; ".join([*filter(None, [layer.get("reason")]), *layer.get("notes", ())])
        rows.append((layer["name"], *(layer.get(key) for key in keys), told))
    facts: dict[str, Any] = {"flow": document.get("flow", "?"), "layers": len(layers)}
    statuses = Counter(str(layer.get("status")) for layer in layers)
    facts["status"] = ", ".join(f"{number} {status}" for status, number in statuses.items())
    output = document.get("output")
    if isinstance(output, dict):
        facts["output"] = ", ".join(f"{k} {_short(v)}" for k, v in output.items() if v is not None)
    for key in ("bytes", "totals"):
        for name, value in (document.get(key) or {}).items():
            facts[f"{key} {name}"] = value
    return Contents("ledger", ("layer", *keys, "notes"), rows, facts)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _calibration_config(document: dict[str, Any]) -> Contents:
    rows = []
    for name, block in document.items():
        if not isinstance(block, dict):
            continue
        inputs, weights = (
            block.get(f"{what}_quant_params") or {} for what in ("activation", "weight")
        )
        found = inputs.get("act_algo") or ("ifmr" if "search_range" in inputs else None)
        rows.append(
            (
                name,
                block.get("quant_enable", True),
                found,
                inputs.get("asymmetric"),
                weights.get("wts_algo"),
                weights.get("num_bits"),
                weights.get("channel_wise"),
                block.get("dmq_balancer_param"),
            )
        )
    columns = ("layer", "enabled", "inputs", "asymmetric", "weights", "bits", "by channel", "DMQ")
    facts = {k: v for k, v in document.items() if not isinstance(v, dict)}
    return Contents("calibration config (create_quant_config)", columns, rows, facts)


def _blocks(document: dict[str, Any], kind: str) -> Contents:
    """Any config with one block a layer."""
    blocks = {name: value for name, value in document.items() if isinstance(value, dict)}
    rows = [(name, json.dumps(block, ensure_ascii=False)) for name, block in blocks.items()]
    facts = {name: value for name, value in document.items() if name not in blocks}
    return Contents(kind, ("layer", "settings"), rows, facts)


def _decomposition(document: list[dict[str, Any]]) -> Contents:
    rows = []
    for item in document:
        layer, pieces = item["ori_layer_info"], item.get("decom_nodes", {})
        shapes = [str(pieces.get(which, {}).get("weight_shape")) for which in ("first", "last")]
        rows.append((layer.get("name"), item.get("mode"), str(layer.get("kernel_size")), *shapes))
    return Contents("decomposition info", ("layer", "mode", "kernel", "first", "last"), rows)


# --- protobuf text -------------------------------------------------------------------------------


def _protobuf_text(path: Path, text: str) -> Contents:
    from amct_pytorch.config import cfg_file
    from amct_pytorch.record.record_file import parse_record

    record_error: AmctError
    try:
        record = parse_record(text, str(path))
    except AmctError as error:
        record_error = error
    else:
        return _record(record)
    parsers: dict[str, Callable[[Path], Any]] = {
        "calibration .cfg": cfg_file.parse_calibration_cfg,
        "retraining .cfg": cfg_file.parse_retrain_cfg,
        "distillation .cfg": cfg_file.parse_distill_cfg,
        "KV-cache .cfg": cfg_file.parse_kv_cache_cfg,
        "channel-prune search .cfg": cfg_file.parse_prune_search_cfg,
    }
    for kind, parse in parsers.items():
        try:
            message = parse(path)
        except AmctError:
            continue
        rows = [(field.name, " ".join(str(value).split())) for field, value in message.ListFields()]
        return Contents(kind, ("field", "value"), rows)
    if path.suffix == ".cfg":
        raise ConfigError(f"{path} is no .cfg of any flow; as a calibration .cfg: {_why_not(path)}")
    raise record_error


def _why_not(path: Path) -> str:
    from amct_pytorch.config.cfg_file import parse_calibration_cfg

    try:
        parse_calibration_cfg(path)
    except AmctError as error:
        return str(error)
    return "it is one"


def _record(record: Any) -> Contents:
    rows: list[tuple[Any, ...]] = []
    for name, factors in record.factors.items():
        scales = factors.scale_w
        rows.append(
            (
                name,
                factors.scale_d,
                factors.offset_d if factors.scale_d is not None else None,
                len(scales),
                min(scales) if scales else None,
                max(scales) if scales else None,
                f"INT{factors.activation_bits}/INT{factors.weight_bits}",
                "complete" if factors.complete else "incomplete",
            )
        )
    facts: dict[str, Any] = {"layers": len(rows)}
    caches = [e.key for e in record.message.record if e.HasField("kv_cache_value")]
    if caches:
        facts["KV caches"] = ", ".join(caches)
        for entry in record.message.record:
            if entry.HasField("kv_cache_value"):
                scale = list(entry.kv_cache_value.scale)
                rows.append((entry.key, None, None, len(scale), min(scale), max(scale), "KV", ""))
    if record.message.prune_record:
        facts["pruning records"] = len(record.message.prune_record)
        for entry in record.message.prune_record:
            for node in (
                *entry.producer,
                *([entry.selective_prune] if entry.HasField("selective_prune") else []),
            ):
                rows.append((node.name, None, None, None, None, None, "pruned", ""))
    columns = (
        "layer", "input scale", "offset", "weight scales", "from", "to", "inputs/weights", "",
    )  # fmt: skip
    return Contents("record of factors", columns, rows, facts)


# --- binary files --------------------------------------------------------------------------------


def _safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open

    from amct_pytorch.flows.converted_files import LAYERS_KEY

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            shapes = {
                name: (tuple(part.get_shape()), part.get_dtype())
                for name in file.keys()  # noqa: SIM118 (no mapping)
                for part in [file.get_slice(name)]
            }
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is no readable safetensors file: {error}") from error
    facts: dict[str, Any] = {"tensors": len(shapes), "bytes": path.stat().st_size}
    if LAYERS_KEY not in metadata:
        rows: list[tuple[Any, ...]] = [(n, kind, str(list(s))) for n, (s, kind) in shapes.items()]
        return Contents(
            "safetensors without quantized layers", ("tensor", "type", "shape"), rows, facts
        )
    layers = json.loads(metadata[LAYERS_KEY])
    facts["quantized layers"] = len(layers)
    rows = []
    for name, spec in layers.items():
        own = {n: s for n, s in shapes.items() if n.rpartition(".")[0] == name}
        told = ", ".join(f"{k}={v}" for k, v in spec.items() if k != "type" and v is not None)
        rows.append((name, spec.get("type"), _elements(own.values()), told))
    return Contents(
        "safetensors of a converted model",
        ("layer", "type", "stored values", "format"),
        rows,
        facts,
    )


def _elements(shapes: Any) -> int:
    return sum(math.prod(shape) for shape, _ in shapes)


def _onnx(path: Path) -> Contents:
    import onnx

    from amct_pytorch.cli.kinds import onnx_kind
    from amct_pytorch.export.onnx_file import load_onnx, size_on_disk

    model = load_onnx(path, "FILE", tensors_stay=True)
    kind = onnx_kind(model)
    graph = model.graph
    operators = Counter(node.op_type for node in graph.node)
    constants = {tensor.name for tensor in graph.initializer}
    most = ", ".join(f"{number} {name}" for name, number in operators.most_common(8))
    facts: dict[str, Any] = {
        "bytes": size_on_disk(path),
        "opset": max((o.version for o in model.opset_import if not o.domain), default=0),
        "inputs": ", ".join(_value(v) for v in graph.input if v.name not in constants),
        "outputs": ", ".join(_value(v) for v in graph.output),
        "nodes": f"{len(graph.node)} ({most})",
        "written by": model.producer_name,
    }
    types = Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer)
    facts["tensors"] = ", ".join(f"{number} {name}" for name, number in types.most_common())
    readers: dict[str, Callable[[onnx.ModelProto], Sequence[tuple[Any, ...]]]] = {
        "deploy": _deploy_layers,
        "modified": _modified_layers,
    }
    columns = {
        "deploy": ("layer", "operator", "scale", "offset", "weights", "weight scales"),
        "modified": ("layer", "operator", "node"),
    }
    if kind == "modified":
        stored = {entry.key: entry.value for entry in model.metadata_props}
        done = "amct.ledger" in stored
        facts["calibration"] = "complete" if done else "not complete: run batch_num batches"
    rows = list(readers[kind](model)) if kind in readers else []
    names = {
        "deploy": "deploy model (AscendQuant/AscendDequant)",
        "modified": "modified model of quantize_model (float, layers tagged)",
        "QDQ": "QDQ model (QuantizeLinear/DequantizeLinear)",
        "fake-quant": "fake-quant model",
        "float": "float ONNX model",
    }
    return Contents(names[kind], columns.get(kind, ()), rows, facts)


def _value(value: Any) -> str:
    kind = value.type.tensor_type
    from onnx import helper

    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
    try:
        name = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    except (KeyError, ValueError, TypeError):
        name = "?"
    return f"{value.name} {name} [{', '.join(map(str, sizes))}]"


def _deploy_layers(model: Any) -> list[tuple[Any, ...]]:
    from amct_pytorch.export.deploy_reader import DeployModel

    rows = []
    for layer in DeployModel(model).layers:
        quantizer = layer.quantizer
        shape = "" if layer.weight is None else f"{layer.weight.dtype} {list(layer.weight.shape)}"
        rows.append(
            (
                layer.name,
                layer.node.op_type,
                1 / float(quantizer.inverse_scale),
                int(quantizer.offset),
                shape,
                int(layer.scale.size),
            )
        )
    return rows


def _modified_layers(model: Any) -> list[tuple[Any, ...]]:
    from amct_pytorch.export.layer_nodes import LAYER_KEY

    return [
        (entry.value, node.op_type, node.name)
        for node in model.graph.node
        for entry in node.metadata_props
        if entry.key == LAYER_KEY
    ]
