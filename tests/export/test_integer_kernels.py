"""Every kernel of the deploy session against integer arithmetic in numpy, at the extremes."""

import numpy as np
import pytest

from amct_pytorch.export import integer_kernels
from amct_pytorch.export.integer_kernels import (
    KERNELS,
    IntegerOp,
    choose_kernel,
    exact_kernels,
    exact_parts,
    reference,
    trials,
)
from amct_pytorch.export.integer_layer import EXACT_FLOAT32


def run(kernel, op, x):
    session = integer_kernels._trial_session(kernel, op, x)
    return session.run(None, {"x": integer_kernels._in_form(x, op.offset, kernel.input_form)})[0]


@pytest.mark.parametrize("op_type", ["Conv", "MatMul"])
@pytest.mark.parametrize("name", ["float32", "split", "u8u8"])
def test_kernels_that_are_exact_everywhere(name, op_type):
    for op, x in trials(op_type):
        if KERNELS[name].fits(op):
            found = run(KERNELS[name], op, x)
            assert found.dtype == np.int32
            assert np.array_equal(found, reference(op, x))


@pytest.mark.parametrize("op_type", ["Conv", "MatMul"])
def test_u8s8_is_used_only_where_it_is_exact(op_type):
    """On x86 without VNNI the products saturate; then the check must have seen it."""
    exact = all(
        np.array_equal(run(KERNELS["u8s8"], op, x), reference(op, x)) for op, x in trials(op_type)
    )
    assert ("u8s8" in exact_kernels(op_type)) == exact


def test_a_kernel_that_saturates_is_found_out(monkeypatch):
    def saturating(graph, op, x, y):
        clipped = np.clip(op.weight, -64, 63)
        KERNELS["u8u8"].write(graph, IntegerOp(op.op_type, clipped, op.offset, op.attributes), x, y)

    bad = integer_kernels.Kernel("bad", "uint8", lambda op: True, saturating)
    assert integer_kernels._try_kernel(bad, "MatMul") is None
    assert integer_kernels._try_kernel(KERNELS["u8u8"], "MatMul") is not None


def test_a_kernel_the_runtime_does_not_have():
    def missing(graph, op, x, y):
        graph.add("Optional", [x], [y])

    kernel = integer_kernels.Kernel("missing", "uint8", lambda op: True, missing)
    assert integer_kernels._try_kernel(kernel, "Conv") is None


def test_float32_only_where_no_sum_can_pass_its_integers():
    small = IntegerOp("MatMul", np.full((100, 3), 127, np.int8), -128)
    large = IntegerOp("MatMul", np.full((600, 3), 127, np.int8), -128)
    assert small.largest_sum() == 100 * 127 * 255
    assert KERNELS["float32"].fits(small)
    assert not KERNELS["float32"].fits(large)
    assert choose_kernel(large, ["float32"]).name == "split"


@pytest.mark.parametrize("shape", [(600, 3), (20_000, 2)])
def test_split_weights_add_up_and_are_exact(shape):
    rng = np.random.default_rng(1)
    op = IntegerOp("MatMul", rng.choice(np.array([-128, 127], np.int8), shape), 127)
    parts = list(exact_parts(op))
    assert sum(w.astype(np.int64) * f for w, f in parts).tolist() == op.weight.tolist()
    assert all(op.largest_sum(w) <= EXACT_FLOAT32 for w, _ in parts)
    x = np.full((2, shape[0]), -128, np.int8)
    assert np.array_equal(run(KERNELS["split"], op, x), reference(op, x))


def test_float32_alone_would_be_wrong_there():
    """The guard is needed: odd sums above 2^24 do not exist in float32."""
    op = IntegerOp(
        "MatMul", np.concatenate([np.full((600, 1), 127), np.ones((1, 1))]).astype(np.int8), -128
    )
    x = np.concatenate([np.full((1, 600), 127), np.full((1, 1), -127)], axis=1).astype(np.int8)
    total = reference(op, x)
    assert total > EXACT_FLOAT32
    assert total % 2 == 1
    assert not np.array_equal(run(KERNELS["float32"], op, x), total)
    assert np.array_equal(run(KERNELS["split"], op, x), total)


def test_reference_against_plain_loops():
    rng = np.random.default_rng(2)
    op, _ = next(t for t in trials("Conv") if t[0].groups == 4)
    x = rng.integers(-128, 128, (1, 12, 4, 4)).astype(np.int8)
    pads = next(a.ints for a in op.attributes if a.name == "pads")
    padded = np.pad(
        x.astype(int) - op.offset, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3]))
    )
    found = reference(op, x)
    for n in range(8):
        g = n // 2
        for i in range(found.shape[2]):
            for j in range(found.shape[3]):
                patch = padded[0, 3 * g : 3 * g + 3, i : i + 3, j : j + 3]
                assert found[0, n, i, j] == (patch * op.weight[n].astype(int)).sum()
