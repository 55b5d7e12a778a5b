"""The deploy file, node by node, against the format it has to have."""

import numpy as np
import onnx
import pytest
from export_networks import NETWORKS, case
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from amct_pytorch.errors import ExportError, RecordError
from amct_pytorch.export.deploy import build_deploy
from amct_pytorch.export.integer_layer import integer_layer, pack_param, unpack_param
from amct_pytorch.export.layer_nodes import LayerNode
from amct_pytorch.graph.weight_layout import WeightLayout
from amct_pytorch.record.factors import LayerFactors


def attributes(node):
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def parts(model):
    nodes = {node.name: node for node in model.graph.node}
    constants = {t.name: t for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    return nodes, constants, makers


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_as_the_format_says(network, per_channel):
    c = case(network, per_channel=per_channel)
    before = c.model.SerializeToString()
    deploy = build_deploy(c.model, c.factors)
    assert c.model.SerializeToString() == before
    nodes, constants, makers = parts(deploy)
    outputs = {o.name for o in deploy.graph.output}
    floats = {t.name: numpy_helper.to_array(t) for t in c.model.graph.initializer}
    originals = {
        p.value: n for n in c.model.graph.node for p in n.metadata_props if p.key == "amct.layer"
    }
    for name, factors in c.factors.items():
        dequant, original = nodes[f"{name}.dequant"], originals[name]
        assert dequant.op_type == "AscendDequant"
        assert attributes(dequant) == {"dtype": 0}
        assert dequant.output[0] in outputs | {f"{name}.dequant.output0"}

        param = constants[dequant.input[1]]
        assert param.name == f"{name}.dequant.param"
        assert param.data_type == onnx.TensorProto.UINT64
        assert list(param.dims) == [len(factors.scale_w)]
        scale = np.asarray(factors.scale_w, np.float32) * np.float32(factors.scale_d)
        bits = numpy_helper.to_array(param)
        assert np.array_equal(bits & 0xFFFFFFFF, scale.view(np.uint32).astype(np.uint64))
        assert not (bits >> np.uint64(32)).any()

        last = makers[dequant.input[0]]
        layer, bias_name = last, last.input[2] if len(last.input) > 2 else None
        if last.op_type == "Add":
            layer = makers[last.input[0]]
            assert layer.op_type == "MatMul"
            bias_name = last.input[1]
        assert layer.op_type == original.op_type
        assert layer.name == name

        quant = makers[layer.input[0]]
        assert quant.op_type == "AscendQuant"
        assert quant.output[0] == f"{quant.name}.output0"
        assert attributes(quant) == {
            "scale": np.float32(1) / np.float32(factors.scale_d),
            "offset": float(factors.offset_d),
            "dst_type": b"INT8",
        }
        assert quant.input[0] == original.input[0] or quant.input[0].endswith(".dequant.output0")

        weight = constants[layer.input[1]]
        assert weight.name == original.input[1]
        assert weight.data_type == onnx.TensorProto.INT8
        assert weight.HasField("raw_data")
        expected = floats[weight.name]
        sizes = attributes(original)
        if sizes.get("transB"):
            expected = expected.T
        assert list(weight.dims) == list(expected.shape)
        column = scale_w = np.asarray(factors.scale_w, np.float32)
        if original.op_type == "Conv":
            column = scale_w.reshape(-1, 1, 1, 1)
        expected = np.clip(
            np.round(expected * np.float32(sizes.get("alpha", 1)) / column), -128, 127
        )
        assert np.array_equal(numpy_helper.to_array(weight), expected)

        if bias_name is not None:
            bias = constants[bias_name]
            assert bias.name == f"{name}.bias"
            assert bias.data_type == onnx.TensorProto.INT32
            real = floats[bias.name].astype(np.float64) * sizes.get("beta", 1)
            assert np.array_equal(numpy_helper.to_array(bias), np.round(real / scale))

        if original.op_type == "Conv":
            assert attributes(layer) == sizes
        if original.op_type == "Gemm":
            assert attributes(layer) == {"transB": 0, "alpha": 1.0, "beta": 1.0}


@pytest.mark.parametrize("network", NETWORKS)
def test_versions_and_metadata(network):
    c = case(network)
    c.model.metadata_props.add(key="amct.extra_ranges", value="{}")
    c.model.graph.node[0].doc_string = "said by the exporter"
    deploy = build_deploy(c.model, c.factors)
    assert [(o.domain, o.version) for o in deploy.opset_import] == [("", 18)]
    assert deploy.ir_version == 8
    assert [(p.key, p.value) for p in deploy.metadata_props] == [("amct.extra_ranges", "{}")]
    assert not deploy.functions
    for node in deploy.graph.node:
        assert not node.metadata_props
        assert not node.doc_string
        assert not node.domain
    names = [n.name for n in deploy.graph.node]
    assert len(set(names)) == len(names)
    assert [i.name for i in deploy.graph.input] == [i.name for i in c.model.graph.input]
    assert [o.name for o in deploy.graph.output] == [o.name for o in c.model.graph.output]


def test_nodes_are_in_order_and_nothing_dangles():
    c = case("shared_input")
    deploy = build_deploy(c.model, c.factors)
    known = {"x", *(t.name for t in deploy.graph.initializer)}
    for node in deploy.graph.node:
        assert known.issuperset(node.input)
        known.update(node.output)
    read = {name for node in deploy.graph.node for name in node.input}
    assert read.issuperset(t.name for t in deploy.graph.initializer)


def test_equal_quantizers_of_one_tensor_are_one():
    c = case("shared_input")
    other = c.factors["c"]
    c.factors["c"] = LayerFactors(other.scale_w, other.scale_d * 2, other.offset_d)
    deploy = build_deploy(c.model, c.factors)
    quants = [n.name for n in deploy.graph.node if n.op_type == "AscendQuant"]
    assert sorted(quants) == ["a.quant", "c.quant", "d.quant"]


def test_layers_without_factors_stay_float():
    c = case("conv_padding")
    del c.factors["stem"]
    nodes, constants, _ = parts(build_deploy(c.model, c.factors))
    assert "stem.quant" not in nodes
    assert constants["stem.weight"].data_type == onnx.TensorProto.FLOAT


def test_a_weight_with_another_reader_keeps_its_float_values():
    c = case("conv_padding")
    c.model.graph.node.append(helper.make_node("ReduceSum", ["stem.weight"], ["s"], keepdims=0))
    c.model.graph.output.append(helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, []))
    _, constants, makers = parts(build_deploy(c.model, c.factors))
    assert constants["stem.weight"].data_type == onnx.TensorProto.FLOAT
    assert constants[makers["stem.y"].input[1]].data_type == onnx.TensorProto.INT8


def test_a_layer_output_that_is_read_and_is_an_output():
    c = case("conv_padding")
    c.model.graph.output.append(helper.make_tensor_value_info("stem.y", 1, [None, 8, 5, 4]))
    _, _, makers = parts(build_deploy(c.model, c.factors))
    assert makers["stem.y"].op_type == "AscendDequant"
    assert makers["r"].input[0] == "stem.y"


def one_conv(weight, bias=None):
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"])
    return LayerNode("conv1", node, node, weight, bias, WeightLayout(0), "w", "b")


def test_bias_beyond_int32_names_the_layer():
    layer = one_conv(np.ones((1, 1, 1, 1), np.float32), np.array([1.0], np.float32))
    with pytest.raises(ExportError, match=r"'conv1'.*channel 0.*beyond int32"):
        integer_layer(layer, LayerFactors((1e-6,), 1e-6, 0))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (LayerFactors((0.1,)), "'stem': calibrate with batch_num batches first"),
        (LayerFactors((), 0.1), "'stem': calibrate with batch_num batches first"),
        (LayerFactors((-0.1,), 0.1), "'stem': scale_w is -0.1"),
        (LayerFactors((0.1,), 0.0), "'stem': scale_d is 0.0"),
        (LayerFactors((0.1,), float("nan")), "'stem': scale_d is nan"),
        (LayerFactors((0.1,), 0.1, 128), "'stem': offset_d is 128; allowed are -128 to 127"),
        (LayerFactors((0.1,) * 3, 0.1), "'stem': the record has 3 values of scale_w; 1 or 8"),
    ],
)
def test_factors_that_cannot_be_used(factors, message):
    c = case("conv_padding")
    with pytest.raises(RecordError, match=message.replace(".", r"\.")):
        build_deploy(c.model, {**c.factors, "stem": factors})


def test_every_layer_without_factors_is_named():
    c = case("conv_padding")
    with pytest.raises(RecordError, match="'stem', 'head'"):
        build_deploy(c.model, dict.fromkeys(c.factors, LayerFactors()))


def test_a_layer_the_model_does_not_have():
    c = case("conv_padding")
    with pytest.raises(RecordError, match=r"'sten' \(did you mean 'stem'\?\)"):
        build_deploy(c.model, {"sten": c.factors["stem"]})


def test_a_layer_found_twice():
    c = case("conv_padding")
    c.model.graph.node[2].metadata_props[0].value = "stem"
    with pytest.raises(ExportError, match="'stem': the ONNX model has 2 nodes"):
        build_deploy(c.model, {"stem": c.factors["stem"]})


floats32 = st.floats(2.0**-23, 1e3, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12),
    floats32,
    st.floats(2.0**-10, 1e3, width=32),
    st.sampled_from([6, 7, 8]),
)
def test_integers_are_the_nearest_and_ties_go_to_even(values, scale_w, scale_d, bits):
    weight = np.array(values, np.float32).reshape(-1, 1, 1, 1)
    bias = np.array(values, np.float32)
    factors = LayerFactors((scale_w,), scale_d, 3, weight_bits=bits)
    try:
        found = integer_layer(one_conv(weight, bias), factors)
    except ExportError:
        product = float(np.float32(scale_w) * np.float32(scale_d))
        assert np.abs(bias).max() / product >= 2**31 - 1
        return
    top = 2 ** (bits - 1)
    for q, w in zip(found.weight.ravel().tolist(), weight.ravel(), strict=True):
        exact = float(np.float32(w) / np.float32(scale_w))
        assert q == max(-top, min(top - 1, round(exact)))
    for q, b in zip(found.bias.tolist(), bias.tolist(), strict=True):
        assert q == round(b / float(found.dequant_scale[0]))


@given(
    st.lists(st.floats(width=32, allow_nan=False, min_value=0), min_size=1), st.integers(-128, 127)
)
def test_param_packs_and_unpacks(scales, offset):
    scales = np.array(scales, np.float32)
    param = pack_param(scales, offset)
    assert param.dtype == np.uint64
    assert not (param >> np.uint64(40)).any()
    back, offsets = unpack_param(param)
    assert np.array_equal(back, scales)
    assert (offsets == offset).all()


def test_force_fp16_clears_the_low_bits_of_the_scale():
    layer = one_conv(np.ones((1, 1, 1, 1), np.float32))
    factors = LayerFactors((0.1,), 0.3, 0, fakequant_precision_mode="FORCE_FP16_QUANT")
    bits = integer_layer(layer, factors).dequant_scale.view(np.uint32)
    plain = (np.float32(0.1) * np.float32(0.3)).view(np.uint32)
    assert bits[0] == plain & 0xFFFFE000
