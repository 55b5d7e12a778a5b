"""ModelEvaluator: batches from .bin files, agreement with the float model, clear errors."""

import numpy as np
import pytest
import torch
from torch import nn

import amct_pytorch as amct
from amct_pytorch.auto_calibration.model_evaluator import DTYPES
from amct_pytorch.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CalibrationError,
    FileMissingError,
)


class Kept(nn.Module):
    """Keeps what it is called with; returns some of it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, *inputs):
        self.calls.append(inputs)
        return {"first": inputs[0].double() * 2, "number": torch.tensor(3)}


def write(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for index, array in enumerate(arrays):
        array.tofile(folder / f"batch_{index:02d}.bin")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_as_it_was_written(tmp_path, dtype):
    low = np.iinfo(dtype).min if np.dtype(dtype).kind in "iu" else 0
    arrays = [(np.arange(24).reshape(2, 3, 4) * 5 + low + i).astype(dtype) for i in range(3)]
    write(tmp_path / "数据_1", arrays)
    evaluator = amct.ModelEvaluator(str(tmp_path / "数据_1"), "in:2,3,4", dtype)
    model = Kept()
    evaluator.calibration(model, batch_num=3)
    assert len(model.calls) == 3
    for (found,), meant in zip(model.calls, arrays, strict=True):
        assert found.numpy().dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found.numpy(), meant)


def test_several_inputs_go_in_the_order_of_the_folders(tmp_path):
    images = [np.random.rand(1, 2, 2).astype("float32") for _ in range(2)]
    masks = [np.array([[True, False]]), np.array([[False, True]])]
    write(tmp_path / "a", images)
    write(tmp_path / "b", masks)
    folders = f"{tmp_path / 'a'}/;{tmp_path / 'b'}/"
    evaluator = amct.ModelEvaluator(folders, "image:0:1,2,2;mask:1,2", "float32;bool")
    model = Kept()
    evaluator.calibration(model, 2)
    for (image, mask), meant, meant_mask in zip(model.calls, images, masks, strict=True):
        np.testing.assert_array_equal(image, meant)
        np.testing.assert_array_equal(mask, meant_mask)


def test_agreement_with_the_first_model(tmp_path):
    write(tmp_path / "a", [np.random.rand(4, 8).astype("float32") for _ in range(3)])
    evaluator = amct.ModelEvaluator(str(tmp_path / "a"), "x:4,8", "float32")
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    original = evaluator.evaluate(model, 3)
    assert original == 1.0
    assert evaluator.evaluate(model, 3) == pytest.approx(1.0)
    half = nn.Linear(8, 5)
    half.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    assert evaluator.evaluate(half, 3) == pytest.approx(1.0)  # a cosine knows no sizes
    negative = nn.Linear(8, 5)
    negative.load_state_dict({k: -v for k, v in model.state_dict().items()})
    worst = evaluator.evaluate(negative, 3)
    assert worst == pytest.approx(-1.0)
    assert evaluator.metric_eval(original, worst) == (False, pytest.approx(2.0))
    assert evaluator.metric_eval(1.0, 0.995)[0]
    with pytest.raises(CalibrationError, match=r"batch 0: .*\[\[4, 6\]\]; .*\[\[4, 5\]\]"):
        evaluator.evaluate(nn.Linear(8, 6), 3)


def test_the_reference_is_the_first_model_and_never_another(tmp_path):
    write(tmp_path / "a", [np.random.rand(4, 8).astype("float32") for _ in range(3)])
    evaluator = amct.ModelEvaluator(str(tmp_path / "a"), "x:4,8", "float32")
    torch.manual_seed(0)
    model, other = nn.Linear(8, 5), nn.Linear(8, 5)
    evaluator.evaluate(model)
    with pytest.raises(CalibrationError, match=r"iterations is 2, and the first model .* on 1; "):
        evaluator.evaluate(other, 2)
    assert evaluator.evaluate(model, 3) == 1.0  # the same one, on more batches
    assert evaluator.evaluate(other, 3) < 0.9
    assert evaluator.evaluate(other, 1) < 0.9


def test_a_model_without_floating_outputs_is_told(tmp_path):
    write(tmp_path / "a", [np.zeros(2, "int64")])
    evaluator = amct.ModelEvaluator(str(tmp_path / "a"), "x:2", "int64")
    with pytest.raises(CalibrationError, match="no floating output"):
        evaluator.evaluate(nn.Identity())


def test_a_run_driven_by_files_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write(tmp_path / "a", [np.random.rand(2, 3, 8, 8).astype("float32") for _ in range(2)])
    evaluator = amct.ModelEvaluator("a", "image:2,3,8,8", "float32")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    original = evaluator.evaluate(model, 2)
    example = torch.zeros(2, 3, 8, 8)
    amct.create_quant_config("c.json", model, example, batch_num=2)
    quantized = amct.quantize_model("c.json", "m.onnx", "r.txt", model, example)
    evaluator.calibration(quantized, 2)
    new = evaluator.evaluate(quantized, 2)
    accepted, loss = evaluator.metric_eval(original, new)
    # 8-bit noise of two layers: 30 dB, a cosine of 0.9995.
    assert accepted and 0 < loss < 1e-3
    amct.save_model("m.onnx", "r.txt", "out/net")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, "x:1", "float32"), ArgumentTypeError, "data_dir is of type int; allowed is str"),
        (("a", "x:1", ""), ArgumentValueError, 'data_types is ""; allowed: entries'),
        (("a", "x", "float32"), ArgumentValueError, "entry .x.; allowed: 'name:n,c,h,w'"),
        (("a", "x:2,0", "float32"), ArgumentValueError, "entry .x:2,0.; allowed"),
        (("a", "x:2,-1", "float32"), ArgumentValueError, "entry .x:2,-1.; allowed"),
        (("a", "x:2;x:3", "float32"), ArgumentValueError, "data_dir has 1 entries and input_sh"),
        (("a;a", "x:2;x:3", "float32"), ArgumentValueError, "a name stands twice"),
        (("a", "x:2", "float32;bool"), ArgumentValueError, "data_types has 2 entries.*one for all"),
        (("a", "x:2", "flaot32"), ArgumentValueError, "did you mean 'float32'.*allowed: float16"),
        (("b", "x:2", "float32"), FileMissingError, "the folder 'b' does not exist"),
        (("c", "x:2", "float32"), FileMissingError, "the folder 'c' has no .bin file"),
    ],
)
def test_wrong_arguments_are_told(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", [np.zeros(2, "float32")])
    write(tmp_path / "c", [])
    with pytest.raises(error, match=message):
        amct.ModelEvaluator(*arguments)


def test_wrong_files_and_numbers_are_told(tmp_path):
    write(tmp_path / "a", [np.zeros(6, "float32"), np.zeros(5, "float32")])
    evaluator = amct.ModelEvaluator(str(tmp_path / "a"), "x:2,3", "float32")
    message = r"batch_01\.bin has 20 bytes; input 'x' of shape 2,3 and type float32 needs 24"
    with pytest.raises(ArgumentValueError, match=message):
        evaluator.calibration(Kept(), 2)
    for number in (0, 3):
        with pytest.raises(ArgumentValueError, match=f"iterations is {number}; allowed: 1 to 2"):
            evaluator.evaluate(Kept(), number)
    with pytest.raises(ArgumentTypeError, match="batch_num is true; allowed: a whole number"):
        evaluator.calibration(Kept(), True)
    with pytest.raises(ArgumentTypeError, match="model is of type int"):
        evaluator.evaluate(3)
