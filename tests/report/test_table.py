"""What the ledger's table tells of each layer, and what calibration writes into a ledger."""

import re

import torch
from torch import nn

from amct_pytorch.config.defaults import default_calibration_config
from amct_pytorch.flows.calibration import CalibrationResult
from amct_pytorch.flows.calibration_ledger import calibration_ledger
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.nn.calibrate import LayerErrors
from amct_pytorch.observers.statistics import Agreement, LayerStatistics
from amct_pytorch.record.factors import LayerFactors
from amct_pytorch.report.ledger import LayerEntry, Ledger, OutputEntry
from amct_pytorch.report.table import ledger_table


def quantized(name: str, **values: object) -> LayerEntry:
    entry = LayerEntry(
        name,
        "Conv2d",
        "quantized",
        input_scale=0.0123456,
        input_offset=-7,
        weight_bits=8,
        weight_scales=16,
        sqnr_db=31.26,
        cosine=0.99961,
    )
    for key, value in values.items():
        setattr(entry, key, value)
    return entry


def row_of(entry: LayerEntry) -> str:
    return ledger_table(Ledger("f", [entry])).splitlines()[2]


def test_a_quantized_layer_shows_its_factors_and_errors() -> None:
    row = row_of(quantized("stem", fused="bn1", notes=["one", "two"]))
    assert row.split()[:7] == ["stem", "Conv2d", "int8/channel", "0.01235", "-7", "31.3", "0.99961"]
    assert row.endswith("+bn1; one; two")


def test_weights_with_one_scale_are_per_tensor() -> None:
    assert "int6/tensor" in row_of(quantized("fc", weight_bits=6, weight_scales=1))


def test_a_float_layer_shows_why() -> None:
    row = row_of(LayerEntry("head", "Linear", "float", "it did not run on input_data"))
    assert row.split(maxsplit=3) == ["head", "Linear", "float", "it did not run on input_data"]


def test_no_error_and_not_measured_look_different() -> None:
    assert "exact" in row_of(quantized("a", sqnr_db=None, cosine=1.0))
    unmeasured = row_of(quantized("a", sqnr_db=None, cosine=None, notes=["not measured"]))
    assert "exact" not in unmeasured
    assert "not measured" in unmeasured


def test_columns_line_up() -> None:
    entries = [quantized("a" * n, input_offset=-(10**n)) for n in (1, 2, 3)]
    lines = ledger_table(Ledger("f", entries)).splitlines()
    ends = {re.search(r"-1\d+(?=\s)", line).end() for line in lines[2:5]}  # type: ignore[union-attr]
    assert len(ends) == 1, "offsets are not right-aligned"
    assert set(lines[1]) == {"-"}
    assert all(line == line.rstrip() for line in lines)


def test_summary() -> None:
    ledger = Ledger(
        "f",
        [quantized("a", bias_corrected=True), quantized("b"), LayerEntry("c", "Linear", "float")],
        OutputEntry(25.04, 0.998, 0.96875),
        {"observe": 1.26},
        {"deploy": 3 * 2**20},
        ["mind this"],
    )
    text = ledger_table(ledger)
    assert "2 of 3 layers quantized, 1 biases corrected" in text
    assert "SQNR 25.0 dB, cosine 0.99800, top-1 agreement 96.9%" in text
    assert "files: deploy 3.00 MiB" in text
    assert "seconds: observe 1.3" in text
    assert text.endswith("note: mind this")
    ledger.output = OutputEntry(None, 1.0)
    assert "SQNR no error, cosine 1.00000" in ledger_table(ledger)
    assert "top-1" not in ledger_table(ledger)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.off = nn.Conv2d(4, 4, 1)
        self.left_out = nn.Conv2d(4, 4, 1)
        self.rare = nn.Conv2d(4, 4, 1)
        self.unused = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rare(self.left_out(self.off(self.bn(self.conv(x)))))


def build(errors: dict[str, LayerErrors], widened: dict[str, int], corrects: bool) -> Ledger:
    model = Net().eval()
    graph = look_at(model, ModelInputs.of(torch.randn(1, 3, 6, 6)))
    config = default_calibration_config(graph.layers)
    layers = dict(config.layers)
    layers["off"] = layers["off"].model_copy(update={"quant_enable": False})
    del layers["left_out"]
    config = config.model_copy(update={"layers": layers})
    statistics = LayerStatistics()
    statistics.inputs.update(torch.tensor([-1.5, 2.5]))
    factors = LayerFactors(scale_w=(0.5, 0.125, 0.25, 0.25), scale_d=0.0625, offset_d=-5)
    result = CalibrationResult(
        {"conv": factors},
        {"conv": statistics},
        errors,
        OutputEntry(20.0, 0.99),
        widened,
        corrects,
        ("rare",),
        {},
        {},
        {},
    )
    return calibration_ledger(graph, config, {"conv": "bn"}, {}, result, {"x": 0.123456})


def test_calibration_ledger_gives_every_layer_with_its_reason() -> None:
    good = Agreement(30.0, 0.999)
    ledger = build({"conv": LayerErrors(good, good, corrected=True)}, {}, corrects=True)
    reasons = {entry.name: entry.reason for entry in ledger.layers}
    assert reasons == {
        "conv": None,
        "off": "the config says quant_enable false",
        "left_out": "it is not in the config",
        "rare": "it did not run on any calibration batch",
        "unused": "it did not run on input_data",
    }
    entry = ledger.layers[0]
    assert (entry.fused, entry.parameters) == ("bn", 4 * 3 * 3 * 3)
    assert (entry.input_scale, entry.input_offset, entry.input_range) == (0.0625, -5, (-1.5, 2.5))
    assert (entry.weight_scales, entry.weight_scale_range) == (4, (0.125, 0.5))
    assert (entry.sqnr_db, entry.cosine, entry.bias_corrected) == (30.0, 0.999, True)
    assert entry.notes == []
    assert ledger.seconds == {"x": 0.1235}


def test_what_was_widened_or_taken_back_is_noted() -> None:
    before, after = Agreement(30.0, 0.999), Agreement(30.0, 0.999)
    errors = {"conv": LayerErrors(before, after, corrected=False)}
    notes = build(errors, {"conv": 3}, corrects=True).layers[0].notes
    assert notes[0].startswith("3 weight scales widened")
    assert notes[1].startswith("bias correction taken back")
    assert build(errors, {}, corrects=False).layers[0].notes == []


def test_an_unmeasured_layer_says_so_and_keeps_its_other_notes() -> None:
    entry = build({}, {"conv": 3}, corrects=True).layers[0]
    assert entry.sqnr_db is None
    assert entry.cosine is None
    assert any("not measured" in note for note in entry.notes)
    assert any("3 weight scales widened" in note for note in entry.notes)
