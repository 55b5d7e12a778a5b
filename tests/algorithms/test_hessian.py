import pytest
import torch

from amct_pytorch.algorithms import hessian
from amct_pytorch.algorithms.hessian import Hessian
from amct_pytorch.errors import ArgumentValueError


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counted(*batches, mask=None):
    matrix = Hessian(batches[0].shape[-1])
    for batch in batches:
        matrix.add(batch, mask)
    return matrix


def exact(x):
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows / len(rows)


# float32 products of 1e4 unit-variance terms: relative error far below 1e-5.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# 300 features make two strips, the second one short.
@pytest.mark.parametrize("features", [7, 300])
def test_mean_is_the_second_moment(features):
    x = tokens(3, 50, features)
    mean = counted(x).mean()
    torch.testing.assert_close(mean.double(), exact(x), **CLOSE)
    assert torch.equal(mean, mean.T)


def test_tokens_count_once_however_batches_are_cut(monkeypatch):
    monkeypatch.setattr(hessian, "CHUNK", 16)
    x = tokens(100, 12)
    cut = counted(x[:1], x[1:70], x[70:])
    assert cut.tokens == 100
    torch.testing.assert_close(cut.mean().double(), exact(x), **CLOSE)


def test_many_batches_lose_no_precision():
    # 1e4 equal batches: a float32 sum would drift by 1e4 roundings of up to 6e-8 each.
    x = tokens(1, 3)
    matrix = counted(*[x] * 10000)
    torch.testing.assert_close(matrix.mean(), (x.T @ x), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_is_left_out(dtype):
    x = tokens(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=dtype)
    padded = x.clone()
    padded[mask == 0] = 1e6
    matrix = counted(padded, mask=mask)
    assert matrix.tokens == 7
    torch.testing.assert_close(matrix.mean().double(), exact(x[mask != 0]), **CLOSE)


def test_mask_broadcasts_over_the_batch():
    x = tokens(3, 4, 2)
    matrix = counted(x, mask=torch.tensor([True, False, True, True]))
    torch.testing.assert_close(matrix.mean().double(), exact(x[:, [0, 2, 3]]), **CLOSE)


def test_merge_counts_what_both_counted():
    x = tokens(30, 5)
    one, other = counted(x[:10]), counted(x[10:])
    one.merge(other)
    assert one.tokens == 30
    torch.testing.assert_close(one.mean().double(), exact(x), **CLOSE)


def test_low_precision_inputs_are_summed_in_float32():
    x = tokens(64, 6).bfloat16()
    torch.testing.assert_close(counted(x).mean().double(), exact(x), **CLOSE)


def test_a_batch_that_is_not_finite_is_refused_and_not_counted():
    x = tokens(10, 300)
    matrix = counted(x)
    before = matrix.mean()
    broken = x.clone()
    broken[3, 299] = float("nan")
    with pytest.raises(ArgumentValueError, match="NaN or infinity"):
        matrix.add(broken)
    assert matrix.tokens == 10
    assert torch.equal(matrix.mean(), before)
    # A token that does not count may hold anything.
    matrix.add(broken, torch.arange(10) != 3)
    assert matrix.tokens == 19


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(3, 5), None, "last axis must be 4"),
        (torch.zeros(3, 4), torch.ones(2), r"mask has shape \(2,\)"),
    ],
)
def test_wrong_shapes_are_refused(x, mask, message):
    with pytest.raises(ArgumentValueError, match=message):
        Hessian(4).add(x, mask)


def test_without_tokens_there_is_no_mean():
    with pytest.raises(ArgumentValueError, match="no token"):
        Hessian(4).mean()
