"""Models whose large tensors stay in their file."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from amct_pytorch.errors import ExportError, FileMissingError
from amct_pytorch.export.onnx_file import load_onnx, save_onnx
from amct_pytorch.export.onnx_graph import OnnxGraph
from amct_pytorch.export.opset import plain_model
from amct_pytorch.export.stored import is_stub, with_all_data, with_data


def model(opset=18, doc="a tensor"):
    """c = x + large + small, with a tensor that is not stored raw."""
    tensors = [
        numpy_helper.from_array(np.arange(3000, dtype=np.float32).reshape(3, 1000), "large"),
        numpy_helper.from_array(np.float32([2.0]), "small"),
        helper.make_tensor("typed", TensorProto.FLOAT, [1000], np.arange(1000.0)),
    ]
    tensors[0].doc_string = doc
    nodes = [
        helper.make_node("Add", ["x", "large"], ["a"], name="first"),
        helper.make_node("Add", ["a", "small"], ["b"], name="second"),
        helper.make_node("Add", ["b", "typed"], ["c"], name="third"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 1000]) for name in ("x", "c")
    ]
    graph = helper.make_graph(nodes, "main", ends[:1], ends[1:], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    made.metadata_props.add(key="key", value="value")
    return made


def stubs(found):
    return [tensor.name for tensor in found.graph.initializer if is_stub(tensor)]


@pytest.mark.parametrize("own_writer", [True, False])
def test_only_large_raw_tensors_stay_and_all_can_be_read(tmp_path, own_writer):
    # onnx writes the graph's fields in the order of their numbers, save_onnx tensors last.
    file = tmp_path / "model.onnx"
    save_onnx(model(), file) if own_writer else onnx.save(model(), file)
    found = load_onnx(file, tensors_stay=True)
    assert stubs(found) == ["large"]
    assert found.ByteSize() < model().ByteSize() - 11_000
    assert with_all_data(found) == model()
    assert np.array_equal(OnnxGraph(found).array("large"), np.arange(3000.0).reshape(3, 1000))


@pytest.mark.parametrize("largest_file", [None, 1000])
def test_a_model_with_stubs_is_written_as_one_without(tmp_path, largest_file):
    save_onnx(model(), tmp_path / "model.onnx")
    found = load_onnx(tmp_path / "model.onnx", tensors_stay=True)
    for name, written in (("a", model()), ("b", found)):
        (tmp_path / name).mkdir()
        save_onnx(written, tmp_path / name / "model.onnx", largest_file=largest_file)
    # A stub's data comes last in its tensor: the same message, its fields in another order.
    sizes = [{f.name: f.stat().st_size for f in (tmp_path / name).iterdir()} for name in "ab"]
    assert sizes[0] == sizes[1]
    assert load_onnx(tmp_path / "a/model.onnx") == load_onnx(tmp_path / "b/model.onnx")


def test_a_model_can_be_rewritten_over_the_file_it_is_read_from(tmp_path):
    file = tmp_path / "model.onnx"
    save_onnx(model(), file)
    found = load_onnx(file, tensors_stay=True)
    found.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.float32([7.0]), "small"))
    save_onnx(found, file)
    expected = model()
    expected.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.float32([7.0]), "small"))
    assert load_onnx(file) == expected


def test_a_file_that_changes_meanwhile_is_told(tmp_path):
    file = tmp_path / "model.onnx"
    save_onnx(model(), file)
    found = load_onnx(file, tensors_stay=True)
    save_onnx(model(doc="longer than before"), file)
    with pytest.raises(ExportError, match=r"model\.onnx.* was changed"):
        with_data(found.graph.initializer[0])
    file.unlink()
    with pytest.raises(ExportError, match="cannot be read any more"):
        save_onnx(found, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_another_opset_is_brought_to_18_with_the_data(tmp_path):
    save_onnx(model(opset=17), tmp_path / "model.onnx")
    plain, opset = plain_model(load_onnx(tmp_path / "model.onnx", tensors_stay=True))
    assert opset == 18
    (large,) = (tensor for tensor in plain.graph.initializer if tensor.name == "large")
    assert np.array_equal(numpy_helper.to_array(large).ravel(), np.arange(3000.0))


def test_files_cut_anywhere_are_refused_in_the_same_words(tmp_path):
    file = tmp_path / "model.onnx"
    save_onnx(model(), file)
    whole = file.read_bytes()
    for length in (1, 10, 60, 200, 1500, len(whole) - 1):
        file.write_bytes(whole[:length])
        told = []
        for tensors_stay in (False, True):
            with pytest.raises(ExportError) as caught:
                load_onnx(file, tensors_stay=tensors_stay)
            told.append(str(caught.value))
        assert told[0] == told[1]


def test_a_tensor_of_the_wrong_size_is_refused(tmp_path):
    wrong = model()
    wrong.graph.initializer[0].dims[0] = 4
    (tmp_path / "model.onnx").write_bytes(wrong.SerializeToString())
    with pytest.raises(ExportError, match='tensor "large" cannot be read'):
        load_onnx(tmp_path / "model.onnx", tensors_stay=True)


@pytest.mark.parametrize("tensors_stay", [False, True])
@pytest.mark.filterwarnings("ignore:Ignoring unknown external data key")
def test_a_file_that_claims_to_hold_a_stub_reads_no_other_file(tmp_path, tensors_stay):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 12_000)
    found = secret.stat()
    version = f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"
    crafted = model()
    tensor = crafted.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    place = {"location": str(secret), "offset": "0", "length": "12000", "amct.version": version}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)

    def load(content):
        (tmp_path / "model.onnx").write_bytes(content.SerializeToString())
        load_onnx(tmp_path / "model.onnx", tensors_stay=tensors_stay)

    with pytest.raises(FileMissingError, match="external data"):
        load(crafted)
    tensor.ClearField("data_location")  # onnx looks at nothing else
    with pytest.raises(ExportError, match='tensor "large" cannot be read'):
        load(crafted)
