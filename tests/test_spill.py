"""Tensors in files."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.spill import KeptInputs, Spill


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_set_aside_is_the_same_tensor(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout]((torch.randn(2, 3, 4, 5) * 3).to(dtype))
    before, stride, where = x.clone(), x.stride(), x.data_ptr()
    with closing(Spill("tensors")) as spill:
        spill.set_aside(x)
    assert x.data_ptr() != where
    assert x.stride() == stride
    assert torch.equal(x, before)
    if dtype == torch.float32:
        x.relu_()
        assert torch.equal(x, before.relu())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_its_own_memory_is_let_go() -> None:
    x = torch.randn(2**24)
    before = anonymous_bytes()
    with closing(Spill("tensors")) as spill:
        spill.set_aside(x)
        # Less what writing it may have left in the allocator.
        assert anonymous_bytes() < before - 0.9 * x.nbytes
    assert bool(x.isfinite().all())


class Own(Tensor):
    """A subclass."""


def test_what_does_not_fill_its_memory_and_subclasses_stay() -> None:
    base = torch.randn(4, 6)
    for x in (base[:, ::2], base[:1].expand(4, 6), torch.randn(3).as_subclass(Own), base[:0]):
        where, before = x.data_ptr(), x.clone()
        with closing(Spill("tensors")) as spill:
            spill.set_aside(x)
        assert x.data_ptr() == where
        assert torch.equal(x, before)


def test_kept_inputs_come_back_as_often_as_wanted() -> None:
    x, mask = torch.randn(2, 3).t(), torch.tensor([True, False])
    with closing(Spill("inputs")) as spill:
        kept = KeptInputs(ModelInputs((x, [mask, 3]), {"scale": torch.tensor(2.0)}), spill)
        first = kept.taken()
        first.args[0].zero_()
        again = kept.taken()
    assert torch.equal(again.args[0], x)
    assert torch.equal(again.args[1][0], mask)
    assert again.args[1][1] == 3
    assert float(again.kwargs["scale"]) == 2.0
