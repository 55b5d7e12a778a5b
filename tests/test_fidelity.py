"""The figures that the demo and the benchmarks print are what they say."""

from __future__ import annotations

import fidelity
import numpy as np
import pytest


def test_equal_logits_are_perfect():
    logits = np.random.RandomState(0).randn(6, 10)
    result = fidelity.compare(logits, logits.copy(), logits.argmax(1))
    assert result.sqnr_db == float("inf")
    assert result.cosine == pytest.approx(1, abs=1e-12)
    assert (result.agreement, result.top1, result.top5) == (1, 1, 1)


def test_known_noise_gives_known_decibels():
    reference = np.ones((4, 25))
    assert fidelity.sqnr_db(reference, reference * 1.1) == pytest.approx(20)
    assert fidelity.sqnr_db(reference, reference * 0.99) == pytest.approx(40)


def test_shares_count_images():
    reference = np.eye(8)
    other = reference.copy()
    other[0] = np.arange(8)  # best class 7, class 0 last
    other[1] = np.where(np.arange(8) == 1, 4.5, np.arange(8))  # class 1 third
    result = fidelity.compare(reference, other, np.arange(8))
    assert result.agreement == result.top1 == 6 / 8
    assert result.top5 == 7 / 8


def test_different_images_are_refused():
    with pytest.raises(ValueError, match="same images"):
        fidelity.compare(np.ones((3, 4)), np.ones((2, 4)), np.ones(3))
