"""`make accuracy` keeps what is finished, goes on behind it, and says what failed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("accuracy")
    page = tmp_path / "accuracy.md"
    page.write_text("<!-- accuracy: begin -->\n<!-- accuracy: end -->\n")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results" / "accuracy.json")
    monkeypatch.setattr(module, "PAGE", page)
    return module


def figures(compressed: float, own: float | None = 90.0) -> dict[str, object]:
    return {"float": own, "compressed": compressed, "size": 0.25, "note": "told"}


def test_an_interrupted_run_goes_on_behind_the_rows_that_are_kept(accuracy, monkeypatch, capsys):
    measured = []

    def measure(name: str) -> dict[str, object] | None:
        measured.append(name)
        if name == "ptq-lite0":
            raise KeyboardInterrupt
        return None if name == "ptq-minilm" else figures(89.5)

    monkeypatch.setattr(accuracy, "measure_apart", measure)
    names = ["ptq-fashion", "ptq-lite0", "ptq-minilm", "ptq-waifu2x"]
    with pytest.raises(KeyboardInterrupt):
        accuracy.run(names, again=False)
    assert list(accuracy.kept()) == ["ptq-fashion"]

    names.remove("ptq-lite0")
    assert accuracy.run(names, again=False) == 1
    assert measured == ["ptq-fashion", "ptq-lite0", "ptq-minilm", "ptq-waifu2x"]
    assert list(accuracy.kept()) == ["ptq-fashion", "ptq-waifu2x"]
    assert "failed, and not kept: ptq-minilm" in capsys.readouterr().err
    assert accuracy.run(["ptq-fashion"], again=True) == 0
    assert measured[-1] == "ptq-fashion"
    row = next(x for x in accuracy.PAGE.read_text().splitlines() if "Fashion-MNIST ResNet" in x)
    assert row.endswith("| top-1 % | 90.00 | 89.50 | -0.50 | 0.250 | told |")


def test_perplexities_differ_in_percent_and_rows_without_a_float_figure_by_nothing(accuracy):
    table = accuracy.markdown(
        {"low-bit-gptq": figures(27.5, 25.0), "qat8-lite0": figures(22.9, None)}
    )
    assert "| `quantize`, `gptq` | SmolLM2-135M | perplexity | 25.00 | 27.50 | +10.0 % |" in table
    assert "| logits SQNR dB | – | 22.90 | – | 0.250 | told |" in table
    assert f"{len(accuracy.ROWS) - 2} of {len(accuracy.ROWS)} rows are not measured yet." in table


def test_what_examples_print_is_read_or_the_row_ends(accuracy):
    tools = importlib.import_module("accuracy_tools")
    assert tools.numbers("float 91.83 %, 2:4 83.06 %", r"float ([\d.]+) %, 2:4 ([\d.]+)") == [
        91.83,
        83.06,
    ]
    with pytest.raises(SystemExit, match="has the example changed"):
        tools.numbers("float: 91.83", r"float ([\d.]+) %")


def test_the_row_of_decomposition_knows_what_its_benchmark_takes_and_gives(
    accuracy, monkeypatch, tmp_path
):
    monkeypatch.syspath_prepend(BENCHMARKS.parent / "examples")
    fashion = importlib.import_module("fashion_mnist")
    asked = []

    def trained(*options: int) -> torch.nn.Module:
        asked.append(options)
        return fashion.resnet(16).eval()

    images = torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(fashion, "trained", trained)
    monkeypatch.setattr(fashion, "load", lambda part: images)
    monkeypatch.setattr(fashion, "train", lambda *settings: None)
    monkeypatch.setattr(fashion, "accuracy", lambda network, *test: 90.0)
    (row,) = (row for row in accuracy.ROWS if row.name == "decompose-fashion")
    found = row.measure(tmp_path)
    # The network of the table's other Fashion-MNIST rows.
    assert asked == [(32, 3, 60000)]
    assert found.note.endswith(" times fewer FLOPs; 90.00 before training")
    assert found.size is not None and found.size < 1
