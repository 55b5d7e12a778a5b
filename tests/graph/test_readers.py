"""Which layers' outputs only float operators read."""

from typing import Any

import torch
import torch.nn.functional as F
from graph.networks import Net, conv, image, norm
from torch import Tensor, nn

from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.readers import layers_read_in_float
from amct_pytorch.graph.tensors import ModelInputs


def found(run: Any, *names: str, **modules: nn.Module) -> set[str]:
    graph = look_at(Net(run, **modules), ModelInputs.of(image()))
    return set(layers_read_in_float(graph, names, graph.fusable_norms))


def test_a_chain_has_none() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.b(F.relu(self.bn(self.a(x))))

    assert found(run, "a", "b", a=conv(), bn=norm(), b=conv()) == set()


def test_a_residual_sum_is_read_in_float() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return F.relu(self.bn(self.b(y)) + y)

    # a's output also goes into b, whose input range bounds it.
    assert found(run, "a", "b", a=conv(), b=conv(), bn=norm()) == {"b"}
    assert found(run, "a", a=conv(), b=conv(), bn=norm()) == {"a"}


def test_movement_is_looked_through() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1).flatten(2).relu()
        return y.softmax(-1)

    assert found(run, "a", "b", a=conv(), b=conv()) == {"a", "b"}


def test_many_ways_to_one_reader_are_walked_once() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        for _ in range(40):  # 2^40 ways for a walk without memory
            y = F.max_pool2d(torch.cat([y.relu(), y], 3), (1, 2))
        return y.sigmoid()

    assert found(run, "a", a=conv()) == {"a"}
