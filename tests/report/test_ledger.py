"""The ledger as JSON, and the comparison of whole outputs."""

import json
import math

import pytest
import torch

from amct_pytorch.report.ledger import LayerEntry, Ledger, OutputEntry, decibels, output_entry


def example() -> Ledger:
    return Ledger(
        "quantize_model",
        [
            LayerEntry(
                "stem.conv",
                "Conv2d",
                "quantized",
                parameters=864,
                fused="stem.bn",
                input_scale=0.018,
                input_offset=-3,
                input_range=(-2.25, 2.5),
                weight_bits=8,
                weight_scales=32,
                weight_scale_range=(1e-4, 0.25),
                sqnr_db=31.25,
                cosine=0.9996,
                sqnr_db_uncorrected=30.5,
                bias_corrected=True,
                notes=["one", 'two "quoted"'],
            ),
            LayerEntry("head", "Linear", "float", "it did not run on input_data", 40),
        ],
        OutputEntry(25.5, 0.998, 0.96875),
        {"observe": 1.25},
        {"deploy": 123456},
        ["größer"],
    )


def test_json_round_trip_gives_an_equal_ledger() -> None:
    ledger = example()
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert Ledger.from_json(ledger.to_json(indent=4)) == ledger
    bare = Ledger("quantize_model", [])
    assert Ledger.from_json(bare.to_json()) == bare


def test_json_is_what_other_programs_read() -> None:
    raw = json.loads(example().to_json())
    assert raw["version"] == 1
    assert raw["layers"][0]["input_range"] == [-2.25, 2.5]
    assert raw["layers"][1]["reason"] == "it did not run on input_data"
    assert raw["output"] == {"sqnr_db": 25.5, "cosine": 0.998, "top1_agreement": 0.96875}


def test_no_nan_or_infinity_gets_into_the_json() -> None:
    ledger = example()
    for pair in ((1.0, 1.0), (0.0, 1.0), (1.0, math.nan), (1.0, math.inf)):
        a, b = (torch.full((2, 3), value) for value in pair)
        ledger.output = output_entry([a], [b])
        text = ledger.to_json()
        assert "NaN" not in text
        assert "Infinity" not in text
    ledger.layers[0].sqnr_db = math.nan
    with pytest.raises(ValueError, match="JSON"):
        ledger.to_json()


def test_no_error_and_no_signal_are_not_the_same() -> None:
    assert decibels(math.inf) is None
    assert decibels(None) is None
    assert decibels(12.5) == 12.5
    for lost in (-math.inf, math.nan):
        value = decibels(lost)
        assert value is not None
        assert value <= -100


@pytest.mark.parametrize(
    ("sqnr_db", "cosine", "poor"),
    [
        (None, 1.0, False),
        (25.0, 0.999, False),
        (10.0, 0.95, False),
        (9.99, 0.999, True),
        (25.0, 0.949, True),
        (None, 0.0, True),
        (-3.0, -1.0, True),
    ],
)
def test_poor_threshold(sqnr_db: float | None, cosine: float, poor: bool) -> None:
    assert OutputEntry(sqnr_db, cosine).poor is poor


def test_the_worst_output_speaks_for_the_model() -> None:
    good, bad = torch.randn(4, 5), torch.randn(4, 5)
    found = output_entry([good, bad], [good + 1e-4, bad + 1.0])
    alone = output_entry([bad], [bad + 1.0])
    assert found is not None
    assert alone is not None
    assert found.sqnr_db == alone.sqnr_db


def test_a_lost_output_is_poor() -> None:
    x = torch.randn(4, 5)
    for other in (x * math.nan, x.where(x != x.max(), math.inf)):
        found = output_entry([x], [other])
        assert found is not None
        assert found.poor
    silent = output_entry([torch.zeros(4, 5)], [x])
    assert silent is not None
    assert silent.poor
    assert silent.sqnr_db is not None


def test_top1_agreement_counts_rows() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    b = torch.tensor([[0.9, 0.0], [0.1, 0.2], [0.0, 1.0], [0.3, 0.4]])
    found = output_entry([a], [b])
    assert found is not None
    assert found.top1_agreement == 0.75
    for shape in ((4,), (4, 1), (2, 3, 4, 4), (0, 3)):
        other = output_entry([torch.ones(shape)], [torch.ones(shape)])
        assert other is not None
        assert other.top1_agreement is None


def test_integer_outputs_and_outputs_that_changed_shape_are_left_out() -> None:
    index, x = torch.tensor([1, 2]), torch.ones(3)
    assert output_entry([index], [index + 1]) is None
    assert output_entry([], []) is None
    assert output_entry([x], [torch.ones(4)]) is None
    found = output_entry([index, x], [index + 1, x.clone()])
    assert found == OutputEntry(None, 1.0, None)
