"""Graph surgery, and ONNX files written whole or not at all."""

import logging

import numpy as np
import onnx
import pytest
from export_networks import Net, case, tensors
from onnx import TensorProto, helper, numpy_helper, parser

from amct_pytorch.errors import ExportError, FileAccessError, FileMissingError
from amct_pytorch.export.deploy import build_deploy
from amct_pytorch.export.fake_quant import build_fake_quant
from amct_pytorch.export.layer_nodes import LayerFinder, layer_names, layer_of, tag_layer
from amct_pytorch.export.onnx_file import load_onnx, save_onnx
from amct_pytorch.export.onnx_graph import OnnxGraph, attribute, set_attribute, topological_order
from amct_pytorch.export.opset import plain_model
from amct_pytorch.files import WholeFiles

WITH_IF = """<ir_version: 8, opset_import: ["": 18]>
g (float[2] x, bool c) => (float[2] y) {
  a = Neg(x)
  b = Abs(x)
  y = If (c) <
    then_branch = t () => (float[2] p) { p = Exp(a) },
    else_branch = e () => (float[2] q) { q = Identity(b) }
  >
}"""


def test_subgraphs_count_as_readers_and_are_rewired():
    graph = OnnxGraph(parser.parse_model(WITH_IF))
    assert [n.op_type for n in graph.readers()["a"]] == ["If"]
    assert graph.count_reads("a") == 1
    graph.add("Relu", ["a"], ["r"])
    graph.replace_reads("a", "r", but=graph.nodes[-1:])
    graph.replace_reads("b", "a")
    model = graph.model(opset=18, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    assert sorted(n.op_type for n in model.graph.node) == ["If", "Neg", "Relu"]


def test_order_is_restored_and_a_cycle_is_named():
    nodes = [
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
    ]
    assert [n.output[0] for n in topological_order(nodes)] == ["a", "b", "c"]
    nodes[1].input[0] = "c"
    nodes[0].name = "first"
    with pytest.raises(ExportError, match="cycle through node 'first'"):
        topological_order(nodes)


def test_fresh_names_are_free_and_scalars_stay_scalars():
    graph = OnnxGraph(case("gemm").model)
    assert graph.fresh("fc1.weight") == "fc1.weight_1"
    assert graph.fresh("fc1.weight") == "fc1.weight_2"
    assert graph.fresh("new") == "new"
    graph.set_array("scalar", np.float32(3))
    assert graph.array("scalar").shape == ()
    assert graph.array("nothing") is None


def test_attributes():
    node = helper.make_node("Gemm", ["a", "b"], ["c"], alpha=0.5)
    set_attribute(node, "transB", 1)
    set_attribute(node, "alpha", None)
    assert attribute(node, "transB") == 1
    assert attribute(node, "alpha", 2.0) == 2.0


def test_layers_by_tag():
    model, _ = Net(1, 4, 5, 5), None
    x = model.conv("a", "x", 4, 4)
    built = model.model(model.conv("b.c", x, 4, 2))
    assert layer_names(built) == ["a", "b.c"]
    tag_layer(built.graph.node[0], "other")
    assert layer_of(built.graph.node[0]) == "other"
    with pytest.raises(ExportError, match="'a': the ONNX model has no node for it"):
        LayerFinder(OnnxGraph(built)).find("a")


def test_gemm_factors_are_worked_in_and_transposes_folded():
    c = case("gemm")
    finder = LayerFinder(OnnxGraph(c.model))
    floats = {t.name: numpy_helper.to_array(t) for t in c.model.graph.initializer}
    fc1, fc2 = finder.find("fc1"), finder.find("fc2")
    assert np.array_equal(fc1.weight, floats["fc1.weight"].T)
    assert np.array_equal(fc2.weight, floats["fc2.weight"] * np.float32(0.5))
    assert np.array_equal(fc2.bias, floats["fc2.bias"] * np.float32(2))
    assert finder.find("fc3").bias is None


def test_a_weight_behind_a_transpose_is_a_constant():
    """torch exports a Linear on 3-D inputs as MatMul with a Transpose of its parameter."""
    net = Net(1, 5, 12)
    weight = net.constant("fc.weight", net.weights(7, 12))
    net.op("Transpose", [weight], "w_t", perm=[1, 0])
    net.op("MatMul", ["x", "w_t"], "mm")
    tag_layer(net.nodes[-1], "fc")
    model = net.model(net.op("Add", ["mm", net.constant("fc.bias", net.weights(7, 1)[:, 0])], "y"))
    from export_networks import LayerFactors

    factors = {"fc": LayerFactors((0.01,), 0.02, 0)}
    deploy = build_deploy(model, factors)
    assert [n.op_type for n in deploy.graph.node] == [
        "AscendQuant",
        "MatMul",
        "Add",
        "AscendDequant",
    ]
    fake = build_fake_quant(model, factors)
    x = net.data()
    assert (
        np.abs(tensors(fake, ["y"], {"x": x})["y"] - tensors(model, ["y"], {"x": x})["y"]).max()
        < 0.2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.zeros((8, 3, 3, 3), np.float64), "type float64; allowed are float32 and float16"),
        (np.full((8, 3, 3, 3), np.nan, np.float32), "NaN or infinite"),
    ],
)
def test_weights_that_cannot_be_quantized(change, message):
    c = case("conv_padding")
    graph = OnnxGraph(c.model)
    graph.set_array("stem.weight", change)
    with pytest.raises(ExportError, match=f"'stem': its weight has .*{message}"):
        LayerFinder(graph).find("stem")


def test_a_weight_that_is_computed():
    net = Net(1, 4, 5, 5)
    y = net.conv("a", "x", 4, 4)
    net.nodes[0].input[1] = "neg"
    net.nodes.insert(0, helper.make_node("Neg", ["a.weight"], ["neg"]))
    with pytest.raises(ExportError, match="'a': its weight is not a constant"):
        LayerFinder(OnnxGraph(net.model(y))).find("a")


def test_newer_and_older_opsets(caplog):
    model = case("gemm").model
    for version in (13, 20):
        model.opset_import[0].version = version
        plain, opset = plain_model(model)
        assert opset == 18
        assert layer_names(plain) == ["fc1", "fc2", "fc3"]
    model.graph.node[0].domain = "vendor"
    model.graph.node[0].name = "special"
    with pytest.raises(ExportError, match="'special' has operator vendor"):
        plain_model(model)
    gelu = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20]> g (float[2] x) => (float[2] y) { y = Gelu(x) }'
    )
    with caplog.at_level(logging.WARNING, "amct_pytorch"):
        assert plain_model(gelu)[1] == 20
    assert "needs opset 20" in caplog.text


def big_model():
    net = Net(1, 64)
    return net.model(net.gemm("fc.one/two", "x", 64, 64))


def test_round_trip_and_overwriting_is_said(tmp_path, caplog):
    model = big_model()
    file = tmp_path / "deep" / "er" / "model.onnx"
    save_onnx(model, file)
    assert load_onnx(file) == model
    assert "overwr" not in caplog.text
    save_onnx(model, file)
    assert str(file) in caplog.text
    assert [f.name for f in file.parent.iterdir()] == ["model.onnx"]


def test_external_data_one_file_a_tensor(tmp_path):
    model = big_model()
    file = tmp_path / "model.onnx"
    save_onnx(model, file, external_suffix="_deploy.external", largest_file=1000)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "fc.one_two.weight_deploy.external",
        "model.onnx",
    ]
    assert file.stat().st_size < 2000
    loaded = load_onnx(file)
    for a, b in zip(model.graph.initializer, loaded.graph.initializer, strict=True):
        assert a.name == b.name
        assert np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
    assert loaded.graph.node == model.graph.node
    assert loaded.metadata_props == model.metadata_props
    (tmp_path / "fc.one_two.weight_deploy.external").unlink()
    with pytest.raises(FileMissingError, match="external data"):
        load_onnx(file)


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    write = WholeFiles.write

    def full_disk(self, path, data, **options):
        if str(path).endswith("model.onnx"):
            raise FileAccessError("no space left on device")
        return write(self, path, data, **options)

    monkeypatch.setattr(WholeFiles, "write", full_disk)
    with pytest.raises(FileAccessError, match="no space"):
        save_onnx(big_model(), tmp_path / "model.onnx", largest_file=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileAccessError, match="save_path"):
        save_onnx(big_model(), tmp_path / "file" / "model.onnx", what="save_path")


def test_tensors_not_stored_raw(tmp_path):
    model = big_model()
    typed = helper.make_tensor("t", TensorProto.FLOAT, [300], list(range(300)))
    model.graph.initializer.append(typed)
    save_onnx(model, tmp_path / "model.onnx", largest_file=1000)
    assert (
        numpy_helper.to_array(load_onnx(tmp_path / "model.onnx").graph.initializer[-1])[299] == 299
    )


@pytest.mark.parametrize("size", [1, 40, 5_000, 600_000])
def test_a_model_written_tensor_by_tensor_reads_as_the_same_message(tmp_path, size):
    # Lengths of one to four varint bytes, and parts of the model before and behind its graph.
    model = onnx.ModelProto(ir_version=8, producer_name="x" * 200, doc_string="doc")
    model.opset_import.add(domain="", version=18)
    model.metadata_props.add(key="key", value="value")
    model.graph.name = "main"
    model.graph.node.add(op_type="Add", input=["a", "b"], output=["c"], name="add")
    for name in ("a", "b"):
        values = np.full(size, 3.5, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.output.add(name="c")
    file = tmp_path / "model.onnx"
    save_onnx(model, file)
    read = onnx.ModelProto.FromString(file.read_bytes())
    assert read == model
    assert file.stat().st_size == model.ByteSize()
