"""Labels, sets and groups of channels by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amct_pytorch.graph.coupling.graph import ChannelGraph
from amct_pytorch.graph.coupling.groups import balanced
from amct_pytorch.graph.coupling.labels import (
    ChannelSets,
    along,
    carried,
    compact,
    stays,
    varying,
    vector,
)
from amct_pytorch.graph.coupling.propagation import RULES


def test_ties_are_transitive_whatever_their_order() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        sets = ChannelSets()
        labels = sets.new(30)
        pairs = generator.choice(labels, (20, 2))
        for part in np.split(pairs, 4):
            sets.tie(part[:, 0], part[:, 1], "")
        # By hand: spread the smallest label along the pairs until nothing changes.
        least = {int(label): int(label) for label in labels}
        for _ in labels:
            for one, other in pairs.tolist():
                least[one] = least[other] = min(least[one], least[other])
        assert sets.roots(labels).tolist() == list(least.values())


def test_what_is_tied_to_what_stays_stays_with_all_that_hangs_on_it() -> None:
    sets = ChannelSets()
    labels = sets.new(4)
    sets.tie(labels[:1], labels[1:2], "")
    sets.tie(labels[1:3], np.array([0, labels[2]]), "it meets an input")
    sets.tie(labels[2:3], labels[0:1], "")
    reasons = sets.reasons()
    roots = sets.roots(labels).tolist()
    assert [reasons.get(root) for root in roots] == ["it meets an input"] * 3 + [None]


def test_labels_cost_nothing_where_they_do_not_change() -> None:
    sets = ChannelSets()
    labels = along(sets.new(3), 1, (2, 3, 500, 500))
    assert labels.untyped_storage().nbytes() == 3 * 8
    assert varying(labels) == [1]
    spread = compact(labels.contiguous(), sets)
    assert varying(spread) == [1]
    assert torch.equal(spread, labels)
    assert not carried(stays((4, 4)))


def test_a_vector_ties_what_differs_on_the_other_axes() -> None:
    sets = ChannelSets()
    labels = torch.from_numpy(sets.new(6)).reshape(2, 3)
    found = vector(labels, 1, sets, "")
    assert found.tolist() == [1, 2, 3]
    assert sets.roots(np.arange(7)).tolist() == [0, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("roots", "number", "expected"),
    [([1, 2, 1, 2], 2, True), ([1, 2, 2, 1], 2, True), ([1, 2, 3, 4], 2, False)],
)
def test_blocks_that_hold_the_same_sets_are_balanced_already(
    roots: list[int], number: int, expected: bool
) -> None:
    assert balanced(np.array(roots), number) is expected


def test_the_rules_name_functions_that_torch_has() -> None:
    assert ChannelGraph  # with it every rule is there
    places = (torch, torch.Tensor, torch.nn.functional, torch.linalg, torch._C._nn)
    # What torch.linalg's functions are called where they are seen.
    others = {"linalg_vector_norm", "linalg_norm"}
    missing = [
        name
        for name in RULES
        if not any(hasattr(place, name) or hasattr(place, f"{name}_") for place in places)
    ]
    assert set(missing) <= others
