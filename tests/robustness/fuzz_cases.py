"""Inputs for the public calls: a small network, its good files, and ways to spoil them."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import amct_pytorch as amct
from amct_pytorch.config.models import (
    AdaParams,
    ArqParams,
    CalibrationConfig,
    HfmgParams,
    IfmrParams,
    LayerConfig,
)
from amct_pytorch.errors import AmctError
from amct_pytorch.proto import AMCTConfig, ScaleOffsetRecord

X = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)


class Small(nn.Module):
    """A convolution with BatchNorm, another, and a Linear: every kind of layer node."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, groups=2)
        self.fc = nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.second(torch.relu(self.norm(self.conv(x)))))
        return self.fc(y.mean((2, 3)))


@contextmanager
def folder() -> Iterator[None]:
    """A working directory of its own, removed afterwards."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as path:
        os.chdir(path)
        try:
            yield
        finally:
            os.chdir(before)


@functools.cache
def network() -> Small:
    return Small().eval()


CFG = """\
batch_num: 2  # two
skip_layers: "fc"
fakequant_precision_mode: FORCE_FP16_QUANT
common_config {
  arq_quantize { channel_wise: true quant_bits: 7 }
  ifmr_quantize { search_range_start: 0.8 search_step: .05 asymmetric: false dst_type: INT8 }
}
override_layer_types { layer_type: 'Linear' calibration_config { hfmg_quantize { } } }
override_layer_configs { layer_name: "conv" calibration_config { ada_quantize { } } }
skip_fusion_layers: "norm"
"""


@functools.cache
def good(name: str) -> bytes:
    """One of the files that an undisturbed run leaves."""
    return _run()[name]


@functools.cache
def _run() -> dict[str, bytes]:
    with folder():
        amct.create_quant_config("config.json", network(), X)
        quantized = amct.quantize_model("config.json", "m.onnx", "record.txt", network(), X)
        quantized(X)
        amct.save_model("m.onnx", "record.txt", "net")
        Path("a.cfg").write_text(CFG)
        amct.auto_decomposition(wide(), "info.json", rank_policy="flops")
        return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


def wide() -> nn.Module:
    """A network with a layer that decomposition splits."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


# --- the calls -------------------------------------------------------------------------------


def with_cfg(data: bytes) -> None:
    Path("a.cfg").write_bytes(data)
    amct.create_quant_config("out.json", network(), X, config_defination="a.cfg")


def with_json(data: bytes) -> None:
    Path("config.json").write_bytes(data)
    amct.quantize_model("config.json", "m.onnx", "record.txt", network(), X)


def with_record(data: bytes) -> None:
    Path("m.onnx").write_bytes(good("m.onnx"))
    Path("record.txt").write_bytes(data)
    amct.save_model("m.onnx", "record.txt", "net")


def with_float_model(data: bytes) -> None:
    Path("m.onnx").write_bytes(data)
    Path("record.txt").write_bytes(good("record.txt"))
    amct.save_model("m.onnx", "record.txt", "net")


def with_deploy(data: bytes) -> None:
    Path("deploy.onnx").write_bytes(data)
    told(lambda: amct.deploy_to_qdq("deploy.onnx", "qdq.onnx"))
    amct.DeploySession("deploy.onnx")


def with_info(data: bytes) -> None:
    Path("info.json").write_bytes(data)
    amct.decompose_network(wide(), "info.json")


CALLS: dict[str, tuple[str, Callable[[bytes], None]]] = {
    "cfg": ("a.cfg", with_cfg),
    "json": ("config.json", with_json),
    "record": ("record.txt", with_record),
    "modified onnx": ("m.onnx", with_float_model),
    "deploy onnx": ("net_deploy_model.onnx", with_deploy),
    "info file": ("info.json", with_info),
}


def told(call: Callable[[], object]) -> bool:
    """Whether a call worked; errors made for the user are fine, all others are not."""
    try:
        call()
    except AmctError as error:
        text = str(error)
        assert 0 < len(text) < 20000
        return False
    return True


def only_told(call: Callable[[bytes], None], data: bytes) -> bool:
    """`told` in a folder of its own, where a call that failed must leave no half file."""
    with folder():
        worked = told(lambda: call(data))
        assert not list(Path().glob(".amct-*"))
        return worked


# --- spoiled bytes ---------------------------------------------------------------------------

SPLICES = st.sampled_from(
    [
        *[c.encode() for c in "{}[]\":,<>\\\n\0#'"],
        *b"null true -1 1e99 1e400 NaN Infinity INT16 16 0 0x nan -inf 99999999999999999".split(),
        *("é".encode(), b"\xff", b"\xef\xbb\xbf", "层".encode(), b"\\377", b"\x80\x80\x80\x80\x10"),
        *(b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"record{" * 200),
    ]
) | st.binary(max_size=4)


@st.composite
def spoiled_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The file with a few pieces cut out, doubled, moved or replaced, or its end missing."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 40)))
        middle = draw(st.just(b"") | st.just(data[start:stop] * 2) | SPLICES)
        data = data[:start] + middle + data[stop:]
    if draw(st.integers(0, 9)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    return data


# --- JSON ------------------------------------------------------------------------------------

NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from(
        [0, 1, 8, 16, 1.0, 1e-300, 1e-9, 5e-324, 1e300, 2**31, 2**32, 2**63, 2**64, 10**400, 0.2]
    )
)
STRINGS = st.sampled_from(
    ["ifmr", "hfmg", "arq_quantize", "ada_quantize", "conv", "fc", "norm", "", "FORCE_FP16_QUANT"]
) | st.text(max_size=6)
SCALARS = st.none() | st.booleans() | NUMBERS | STRINGS
MODELS = (CalibrationConfig, LayerConfig, IfmrParams, HfmgParams, ArqParams, AdaParams)
INFO_KEYS = ("ori_layer_info", "name", "mode", "decom_nodes", "first", "core", "last")
KEYS = [*{key for model in MODELS for key in model.model_fields}, "conv", "fc", "norm", *INFO_KEYS]
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | STRINGS, inner, max_size=4)
    ),
    max_leaves=10,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON tree with every key of it."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [p for key in keys for p in ((value, key), *_places(value[key]))]


@st.composite
def spoiled_json(draw: st.DrawFn, data: bytes) -> bytes:
    """The document with values of other types and sizes, keys added, removed, renamed, doubled."""
    document = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        if not places:
            break
        owner, key = draw(st.sampled_from(places))
        kind = draw(st.integers(0, 5))
        if kind <= 2:
            owner[key] = draw(SCALARS if kind else TREES)
        elif kind == 3:
            del owner[key]
        elif isinstance(owner, dict):
            new = draw(st.sampled_from(KEYS) | STRINGS)
            owner[new] = owner.pop(key) if kind == 4 else draw(TREES)
        else:
            owner.append(draw(TREES))
    text = json.dumps(document, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 9)) == 0:
        text = text[0] + text[1:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


# --- protobuf text ---------------------------------------------------------------------------

_TEXT_NUMBERS = (
    "0 1 -1 8 7 6 4 16 0.5 .01 1e-9 1e-40 1e39 1e999 nan inf -inf 4294967295 4294967296 "
    "18446744073709551616 -9223372036854775809 0x10 1.5f true INT8 BAD"
)
TEXT_NUMBERS = st.sampled_from(_TEXT_NUMBERS.split()) | st.floats(width=32).map(repr)
TEXT_STRINGS = st.sampled_from(
    ['"conv"', '"fc"', '"second"', '"Linear"', '"Conv2d"', '"INT8"', '"INT4"', "'x'", '"\\377"']
) | st.text(max_size=4).map(lambda text: json.dumps(text, ensure_ascii=False))


@st.composite
def proto_text(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0) -> str:
    """Fields of a message, in any number and order, mostly with values of their type."""
    lines = []
    for _ in range(draw(st.integers(0, 3 if depth else 5))):
        field = draw(st.sampled_from(list(descriptor.fields)))
        name = field.name if draw(st.integers(0, 15)) else draw(STRINGS) or "zz"
        if field.message_type is not None and draw(st.integers(0, 15)):
            value = "{ " + draw(proto_text(field.message_type, depth + 1)) + " }"
            lines.append(f"{name} {value}")
            continue
        kind = field.type
        if field.enum_type is not None:
            values = [value.name for value in field.enum_type.values]
            value = draw(st.sampled_from(values) | TEXT_NUMBERS)
        elif kind in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            value = draw(TEXT_STRINGS)
        elif kind == FieldDescriptor.TYPE_BOOL:
            value = draw(st.sampled_from(["true", "false", "1", "0", "2", "maybe"]))
        else:
            value = draw(TEXT_NUMBERS)
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


cfg_texts = proto_text(AMCTConfig.DESCRIPTOR).map(lambda text: text.encode("utf-8", "replace"))
record_texts = proto_text(ScaleOffsetRecord.DESCRIPTOR).map(
    lambda text: text.encode("utf-8", "replace")
)
WRONG_SCALES = [0.0, -1.0, math.nan, math.inf, 1e-45, 1e-38, 3e38, 1e-20, 1e20]


@st.composite
def spoiled_records(draw: st.DrawFn, data: bytes) -> bytes:
    """The record with scales, offsets, lengths, keys and types that do not fit."""
    record = text_format.Parse(data.decode(), ScaleOffsetRecord())
    for _ in range(draw(st.integers(1, 3))):
        if not record.record:
            break
        entry = draw(st.sampled_from(list(record.record)))
        kind, value = draw(st.integers(0, 8)), entry.value
        scale = draw(st.sampled_from(WRONG_SCALES) | st.floats(width=32))
        if kind == 0:
            value.scale_d = scale
        elif kind == 1 and value.scale_w:
            value.scale_w[draw(st.integers(0, len(value.scale_w) - 1))] = scale
        elif kind == 2:
            value.offset_d = draw(st.integers(-(2**31), 2**31 - 1))
        elif kind == 3:
            number = draw(st.integers(0, 20))
            del value.scale_w[:], value.offset_w[:]
            value.scale_w.extend([0.01] * number)
            value.offset_w.extend([0] * number)
        elif kind == 4:
            entry.key = draw(st.sampled_from(["conv", "fc", "norm", "second", "", "层"]))
        elif kind == 5:
            field = draw(st.sampled_from(["dst_type", "act_type", "wts_type"]))
            setattr(value, field, draw(st.sampled_from(["INT4", "INT6", "INT7", "INT8", "INT16"])))
        elif kind == 6:
            value.tensor_balance_factor.extend([abs(scale)] * draw(st.integers(1, 9)))
        elif kind == 7:
            value.fakequant_precision_mode = draw(st.sampled_from(["FORCE_FP16_QUANT", "x"]))
        else:
            record.record.add().CopyFrom(entry)
    return text_format.MessageToString(record, as_utf8=True).encode()


# --- ONNX ------------------------------------------------------------------------------------


def _tensors() -> st.SearchStrategy[TensorProto]:
    arrays = st.sampled_from(
        [
            np.zeros((0,), np.float32),
            np.float32(1),
            np.full((8,), np.nan, np.float32),
            np.ones((3, 5), np.float32),
            np.ones((8, 4, 3, 3), np.int8),
            np.ones((4, 8), np.int8),
            np.ones((8,), np.int8),
            np.int8(1),
            np.int32(1),
            np.ones((8,), np.int32),
            np.ones((8,), np.uint64),
            np.full((4,), 2**64 - 1, np.uint64),
            np.array(["a"], object),
            np.ones((1, 1, 1, 1, 1, 1), np.float64),
            np.ones((8, 4, 3, 3), np.float16),
        ]
    )
    return arrays.map(lambda array: numpy_helper.from_array(np.asarray(array)))


ATTRIBUTES = st.sampled_from(
    [
        *("group", "pads", "strides", "dilations", "kernel_shape", "auto_pad", "transB", "transA"),
        *("alpha", "beta", "scale", "offset", "dst_type", "dtype", "perm", "axis", "to"),
    ]
)
VALUES = (
    st.integers(-(2**63), 2**63 - 1)
    | st.integers(-3, 9)
    | st.floats(width=32)
    | STRINGS.filter(lambda s: s.isascii())
    | st.lists(st.integers(-2, 5), min_size=1, max_size=6)
)


@st.composite
def spoiled_onnx(draw: st.DrawFn, data: bytes) -> bytes:
    """The model with nodes, tensors, attributes and metadata missing, doubled or changed."""
    model = onnx.load_from_string(data)
    graph = model.graph
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.integers(0, 17))
        names = [n for node in graph.node for n in (*node.input, *node.output)] or ["x"]
        node = draw(st.sampled_from(list(graph.node))) if graph.node else graph.node.add()
        tensor = (
            draw(st.sampled_from(list(graph.initializer)))
            if graph.initializer
            else graph.initializer.add(name="t")
        )
        if kind == 0:
            graph.node.remove(node)
        elif kind == 1:
            graph.node.add().CopyFrom(node)
        elif kind == 2 and node.input:
            node.input[draw(st.integers(0, len(node.input) - 1))] = draw(
                st.sampled_from([*names, ""])
            )
        elif kind == 3 and node.output:
            node.output[0] = draw(st.sampled_from([*names, ""]))
        elif kind == 4:
            new = draw(_tensors())
            name = tensor.name
            tensor.CopyFrom(new)
            tensor.name = name
        elif kind == 5:
            tensor.data_type = draw(st.integers(-1, 40))
        elif kind == 6:
            del tensor.dims[:]
            tensor.dims.extend(draw(st.lists(st.integers(-1, 2**40), max_size=5)))
        elif kind == 7:
            tensor.raw_data = tensor.raw_data[: draw(st.integers(0, 40))]
        elif kind == 8:
            graph.initializer.remove(tensor)
        elif kind == 9:
            del node.attribute[:]
        elif kind == 10:
            node.attribute.append(helper.make_attribute(draw(ATTRIBUTES), draw(VALUES)))
        elif kind == 11:
            ops = ["Conv", "Gemm", "MatMul", "Add", "AscendQuant", "AscendDequant", "If", "Nope"]
            ops += ["AveragePool", "ConvTranspose", "Identity", "Transpose", "Constant", "Clip"]
            node.op_type = draw(st.sampled_from(ops))
        elif kind == 12:
            del node.input[draw(st.integers(0, 3)) :]
        elif kind == 13:
            del node.output[:]
        elif kind == 14:
            model.opset_import[0].version = draw(st.sampled_from([0, -1, 1, 7, 13, 17, 21, 99]))
        elif kind == 15:
            inner = onnx.GraphProto(name="inner")
            inner.node.append(helper.make_node("Identity", [draw(st.sampled_from(names))], ["i"]))
            inner.output.append(helper.make_tensor_value_info("i", TensorProto.FLOAT, None))
            branches = {"then_branch": inner, "else_branch": copy.deepcopy(inner)}
            graph.node.append(helper.make_node("If", [names[0]], ["o"], **branches))
        elif kind == 16:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
            tensor.external_data.add(
                key="location",
                value=draw(st.sampled_from(["deploy.onnx", "m.onnx", "../x", "gone", "", "/x"])),
            )
            key = draw(st.sampled_from(["offset", "length"]))
            tensor.external_data.add(
                key=key, value=draw(st.sampled_from(["-1", "9", "x", "9" * 30]))
            )
        elif model.metadata_props:
            entry = draw(st.sampled_from(list(model.metadata_props)))
            entry.value = draw(
                st.sampled_from(["", "[]", "{}", "1", '{"layers": [1]}', "[" * 5000, "NaN"])
                | spoiled_json(entry.value.encode() if entry.value[:1] == "{" else b"{}").map(
                    lambda text: text.decode("utf-8", "replace")
                )
            )
    return model.SerializeToString()


def spoiled(name: str) -> st.SearchStrategy[bytes]:
    """Bytes for one of `CALLS`."""
    data = good(CALLS[name][0])
    return {
        "cfg": spoiled_bytes(data) | cfg_texts,
        "json": spoiled_bytes(data) | spoiled_json(data),
        "record": spoiled_bytes(data) | spoiled_records(data) | record_texts,
        "modified onnx": spoiled_bytes(data) | spoiled_onnx(data),
        "deploy onnx": spoiled_bytes(data) | spoiled_onnx(data),
        "info file": spoiled_bytes(data) | spoiled_json(data),
    }[name]
