"""Whatever stands in a file, a call works or tells the user: never another error, no half file.

The same inputs each time, and few; `make fuzz` tries many more (fuzz.py).
"""

import json

import numpy as np
import onnx
import pytest
from fuzz_cases import CALLS, good, only_told, spoiled
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper

EXAMPLES = {"json": 25, "deploy onnx": 40, "modified onnx": 60}


@pytest.mark.parametrize("name", CALLS)
def test_the_file_to_spoil_is_good(name):
    assert only_told(CALLS[name][1], good(CALLS[name][0])) or name == "cfg"


@pytest.mark.parametrize("name", CALLS)
def test_spoiled_files_give_user_errors_only(name):
    @settings(
        max_examples=EXAMPLES.get(name, 80),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(spoiled(name))
    def run(data):
        only_told(CALLS[name][1], data)

    run()


# --- what the fuzzing found, one by one ------------------------------------------------------


def short_tensor(model):
    model.graph.initializer[0].raw_data = b"\0" * 20


def node_without_inputs(model):
    del model.graph.node[0].input[:]


def node_without_outputs(model):
    del model.graph.node[0].output[:]


def weight_input_missing(model):
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    del node.input[1:]


def output_made_twice(model):
    model.graph.node.add().CopyFrom(model.graph.node[0])


def unknown_tensor_type(model):
    model.graph.initializer[0].data_type = 39


def attribute_of_another_type(model):
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    kept = [attribute for attribute in node.attribute if attribute.name != "group"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("group", "two")])


def reads_what_nothing_makes(model):
    model.graph.node[-1].input[0] = "nothing"


def subgraph_reads_what_nothing_makes(model):
    inner = onnx.GraphProto(name="inner")
    inner.node.append(helper.make_node("Identity", ["nothing"], ["i"]))
    inner.output.append(helper.make_tensor_value_info("i", TensorProto.FLOAT, None))
    condition = numpy_helper.from_array(np.array(True), "condition")
    model.graph.initializer.append(condition)
    branches = {"then_branch": inner, "else_branch": inner}
    model.graph.node.append(helper.make_node("If", ["condition"], ["o"], **branches))


def weight_without_dimensions(model):
    tensor = next(t for t in model.graph.initializer if t.name == "conv.weight")
    one = numpy_helper.to_array(tensor).reshape(-1)[0]
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(one), tensor.name))


def no_operator_set(model):
    model.opset_import[0].version = 0


@pytest.mark.parametrize("name", ["modified onnx", "deploy onnx"])
@pytest.mark.parametrize(
    "spoil",
    [
        short_tensor,
        node_without_inputs,
        node_without_outputs,
        weight_input_missing,
        output_made_twice,
        unknown_tensor_type,
        attribute_of_another_type,
        reads_what_nothing_makes,
        subgraph_reads_what_nothing_makes,
        weight_without_dimensions,
        no_operator_set,
    ],
)
def test_models_that_are_not_sound_are_refused(name, spoil):
    model = onnx.load_from_string(good(CALLS[name][0]))
    spoil(model)
    assert not only_told(CALLS[name][1], model.SerializeToString())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": [1]}', "[" * 5000, "NaN"])
def test_a_damaged_ledger_in_the_model_is_told(text):
    model = onnx.load_from_string(good("m.onnx"))
    next(p for p in model.metadata_props if p.key == "amct.ledger").value = text
    assert not only_told(CALLS["modified onnx"][1], model.SerializeToString())


@pytest.mark.parametrize("step", [1e-9, 5e-324])
def test_a_search_step_of_nearly_nothing_is_no_error(step):
    config = json.loads(good("config.json"))
    config["conv"]["activation_quant_params"]["search_step"] = step
    assert only_told(CALLS["json"][1], json.dumps(config).encode())


@pytest.mark.parametrize("text", ["[" * 5000, '{"conv": [0, 1' + "0" * 400 + "]}", "[1]", "{"])
def test_damaged_output_ranges_in_the_model_are_told(text):
    model = onnx.load_from_string(good("net_deploy_model.onnx"))
    model.metadata_props.add(key="amct.extra_ranges", value=text)
    next(p for p in model.metadata_props if p.key == "amct.extra_ranges").value = text
    only_told(CALLS["deploy onnx"][1], model.SerializeToString())
