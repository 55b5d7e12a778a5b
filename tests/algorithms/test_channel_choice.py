"""How many channels of a group stay."""

from __future__ import annotations

import pytest

from amct_pytorch.algorithms.channel_choice import kept_of


@pytest.mark.parametrize(
    ("number", "ratio", "ascend", "multiple", "kept"),
    [
        (20, 0.25, False, 1, 15),
        (20, 0.25, True, 1, 16),
        (64, 0.5, True, 1, 32),
        (64, 0.3, True, 1, 48),  # 45 would stay
        (10, 0.5, True, 1, 10),  # 16 are more than there are
        (10, 0.99, False, 1, 1),  # never all
        (12, 0.5, False, 4, 8),  # 6, in equal blocks of four
        (128, 0.5, True, 32, 64),
        (96, 0.5, True, 3, 48),
    ],
)
def test_number_that_stays(
    number: int, ratio: float, ascend: bool, multiple: int, kept: int
) -> None:
    assert kept_of(number, ratio, ascend, multiple) == kept
