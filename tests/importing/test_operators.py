"""Every operator against the cases that the ONNX standard itself comes with."""

from __future__ import annotations

import functools
import importlib
import warnings

import numpy as np
import pytest
import torch
from onnx.backend.test.case import node as onnx_cases

from amct_pytorch.errors import ModelError
from amct_pytorch.importing.reader import imported
from amct_pytorch.importing.registry import OPERATORS

# Modules of the standard's cases; what else there is costs a minute to make.
MODULES = (
    "add", "argmax", "averagepool", "batch_normalization", "clip", "concat", "conv",
    "convtranspose", "cumsum", "depthtospace", "div", "dropout", "einsum", "elu", "erf",
    "expand", "flatten",
    "gather", "gathernd", "gatherelements", "gelu", "gemm", "globalaveragepool",
    "groupnormalization", "hardsigmoid", "hardswish", "instance_normalization", "leakyrelu", "lrn",
    "matmul", "maxpool", "mod", "onehot", "pad", "pow", "prelu", "rangeop", "reducemax",
    "reducemean", "reduceprod", "reducesum", "reducel2", "relu", "reshape", "resize",
    "scatterelements", "scatternd", "selu", "shape", "sigmoid", "slice", "softmax",
    "spacetodepth", "split", "squeeze", "tile", "topk", "transpose", "trilu", "unsqueeze",
    "where",
)  # fmt: skip
# torch does not compute with these, and no network in float has them in its layers.
OTHER_TYPES = ("uint16", "uint32", "uint64", "bfloat16", "string")
# Wrong: each with the reason. Users meet an error: their model is compared with ONNX Runtime.
DIFFERENT = {
    "test_onehot_out_of_range_indices": "an index that is out of range means the last class",
    "test_resize_upsample_sizes_nearest": "sizes that are no multiple are rounded otherwise",
    "test_resize_downsample_sizes_nearest": "sizes that are no multiple are rounded otherwise",
    "test_resize_downsample_scales_linear_align_corners": "torch computes scales from sizes",
    "test_resize_downsample_scales_cubic_align_corners": "torch computes scales from sizes",
    "test_resize_downsample_sizes_linear_pytorch_half_pixel": "differs where a size is 1",
    "test_top_k_same_values": "of equal values, another may come first",
    "test_top_k_same_values_2d": "of equal values, another may come first",
    "test_top_k_same_values_largest": "of equal values, another may come first",
    "test_reduce_max_empty_set": "an empty axis",
    "test_reduce_max_empty_set_bool": "an empty axis",
}


def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODULES:
            importlib.import_module(f"{onnx_cases.__name__}.{name}")
    found = {}
    for case in onnx_cases._NodeTestCases:
        if case.model.functions or len(case.model.graph.node) != 1:
            continue
        (node,) = case.model.graph.node
        types = {value.type.WhichOneof("value") for value in case.model.graph.input}
        other = any(kind in case.name for kind in OTHER_TYPES) or types - {"tensor_type"}
        if node.op_type in OPERATORS and not node.domain and not other:
            found[case.name] = case
    return found


CASES = cases()


@functools.cache
def outcome(name: str) -> list[np.ndarray] | Exception:
    """The outputs of a case, or why there are none."""
    case = CASES[name]
    inputs, _ = case.data_sets[0]
    try:
        module = imported(case.model, name).module
        with torch.no_grad():
            result = module(*(torch.from_numpy(np.array(x)) for x in inputs))
    except Exception as error:
        return error
    return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]


def refused(name: str) -> bool:
    return isinstance(outcome(name), (NotImplementedError, ModelError))


def test_the_cases_are_many():
    assert len(CASES) > 350
    assert len({case.model.graph.node[0].op_type for case in CASES.values()}) > 55


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_operator_is_right_or_refused(name):
    found = outcome(name)
    if refused(name):
        return  # said, not wrong
    if name in DIFFERENT:
        pytest.skip(DIFFERENT[name])
    if isinstance(found, Exception):
        raise found
    for meant, got in zip(CASES[name].data_sets[0][1], found, strict=False):
        assert got.dtype == meant.dtype
        # float16 cases are the coarsest: their step is 1e-3.
        tolerance = 2e-3 if meant.dtype == np.float16 else 1e-4
        np.testing.assert_allclose(got, meant, rtol=tolerance, atol=tolerance)


def test_few_are_refused():
    found = [name for name in CASES if name not in DIFFERENT and refused(name)]
    # Dilated average pools, odd resizes, masks of dropout, … : nothing that networks have.
    assert len(found) < len(CASES) * 0.13, found
