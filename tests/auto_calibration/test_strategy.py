"""The binary search, and the score layers are ranked by."""

import math

import pytest
import torch

from amct_pytorch.common.auto_calibration import (
    AutoCalibrationEvaluatorBase,
    AutoCalibrationStrategyBase,
    BinarySearchStrategy,
    CosineSimilaritySensitivity,
    SensitivityBase,
)
from amct_pytorch.errors import ArgumentValueError


def search(layers, needed):
    """Runs the strategy where rolling back `needed` layers or more is enough."""
    strategy = BinarySearchStrategy()
    strategy.initialize([(f"layer{i}", i / 100) for i in range(layers)])
    verdict, trials = (False, 1.0), []
    while True:
        stop, flags = strategy.update_quant_config(verdict)
        assert list(flags) == [f"layer{i}" for i in range(layers)]
        rolled_back = [name for name, kept in flags.items() if not kept]
        assert rolled_back == [f"layer{i}" for i in range(len(rolled_back))]  # the most sensitive
        if stop:
            return len(rolled_back), trials
        trials.append(len(rolled_back))
        verdict = (len(rolled_back) >= needed, 0.0)


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 8, 50, 53])
def test_it_finds_the_smallest_roll_back_that_is_enough(layers):
    for needed in range(1, layers + 2):
        found, trials = search(layers, needed)
        # With every layer in float there is nothing to try.
        assert found == min(needed, layers)
        assert len(trials) <= math.ceil(math.log2(layers)) + 1
        assert len(set(trials)) == len(trials)
        if trials:
            assert trials[0] == layers // 2


def test_a_layer_named_twice_is_told():
    with pytest.raises(ArgumentValueError, match="names a layer twice"):
        BinarySearchStrategy().initialize([("a", 0.1), ("a", 0.2)])


def test_cosine_scores():
    score = CosineSimilaritySensitivity().compare
    x = torch.randn(3, 5)
    assert score(x, x) == 1.0
    assert score(x, -x) == pytest.approx(0.0)
    assert score(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(0.5)
    assert score(x, torch.full_like(x, torch.nan)) == 0.0


@pytest.mark.parametrize(
    "base", [AutoCalibrationEvaluatorBase, AutoCalibrationStrategyBase, SensitivityBase]
)
def test_base_classes_say_what_is_missing(base):
    with pytest.raises(TypeError, match="abstract method"):
        base()
