"""What distillation does to the student, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from distilled import FOUR_BITS, Mixed, images, mixed, student_of
from torch import Tensor, nn
from torch.nn import functional as F

import amct_pytorch as amct
from amct_pytorch.distill.distill_sample import DistillSampleBase
from amct_pytorch.distillation import teach
from amct_pytorch.errors import CalibrationError
from amct_pytorch.nn.retrain import retrain_layers
from amct_pytorch.record.record_file import read_record


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loss_of(student: nn.Module, model: nn.Module, seed: int = 1) -> float:
    with torch.no_grad():
        return float(
            sum(F.mse_loss(student(x), model(x)) for x in images(seed=seed)) / len(images())
        )


def test_every_block_gets_nearer_to_the_teacher_and_so_does_the_whole(tmp_path: Path) -> None:
    model = mixed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student, config = student_of(model, tmp_path)
    untouched = {n: t.clone() for n, t in student.state_dict().items() if isinstance(t, Tensor)}
    plain = amct.distill(model, student, config, images(), epochs=0)
    distilled = amct.distill(model, student, config, images(), epochs=20)
    outcomes = distilled.outcomes
    assert [outcome.layers for outcome in outcomes][:3] == [["stem.0"], ["first"], ["second"]]
    assert all(outcome.loss_after <= outcome.loss_before for outcome in outcomes)
    assert sum(o.loss_after < 0.9 * o.loss_before for o in outcomes) >= 3
    # Also on batches that it has not seen.
    assert loss_of(distilled, model) < 0.7 * loss_of(plain, model)
    assert loss_of(distilled, model, seed=2) < 0.7 * loss_of(plain, model, seed=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in student.state_dict().items():
        if name in untouched:
            assert torch.equal(tensor, untouched[name]), name


def test_only_the_block_at_work_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    train, begin = teach.train_block, teach.begin
    at_work: list[nn.Module] = []
    changed: list[set[str]] = []

    def begun(teacher: nn.Module, student: nn.Module, *rest: Any) -> Any:
        at_work.append(student)
        return begin(teacher, student, *rest)

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = {name: tensor.clone() for name, tensor in at_work[0].state_dict().items()}
        outcome = train(*args, **kwargs)
        after = at_work[0].state_dict()
        changed.append({n for n, t in before.items() if not torch.equal(t, after[n])})
        return outcome

    monkeypatch.setattr(teach, "begin", begun)
    monkeypatch.setattr(teach, "train_block", watched)
    amct.distill(model, student, config, images(), epochs=3)
    for group, names in zip(_groups(config), changed, strict=True):
        own = tuple(f"{name}." for name in group)
        own += {"stem.0.": ("stem.1.",), "first.": ("norm.",)}.get(own[0], ())
        assert names, group
        assert all(name.startswith(own) for name in names), (group, names)


def _groups(config: Path) -> list[list[str]]:
    groups: list[list[str]] = json.loads(config.read_text())["distill_group"]
    return groups


def test_an_interrupted_distillation_goes_on_and_ends_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    whole = amct.distill(model, student, config, images(), epochs=3, progress_dir=tmp_path / "a")
    assert not list((tmp_path / "a").glob("*/*"))
    train, calls = teach.train_block, list[int]()

    def fails_at_the_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(teach, "train_block", fails_at_the_third)
    again = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        amct.distill(model, student, config, images(), epochs=3, progress_dir=again)
    assert len(list(again.glob("*/*"))) == 2
    calls.clear()
    calls += [1, 1, 1]
    resumed = amct.distill(model, student, config, images(), epochs=3, progress_dir=again)
    assert len(calls) - 3 == len(_groups(config)) - 2
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    kept = [(o.layers, o.loss_before, o.loss_after, o.best_epoch) for o in whole.outcomes]
    assert kept == [(o.layers, o.loss_before, o.loss_after, o.best_epoch) for o in resumed.outcomes]
    # Other settings do not meet these files.
    calls.clear()
    calls += [1, 1, 1]
    amct.distill(model, student, config, images(), epochs=2, progress_dir=again)
    assert len(calls) - 3 == len(_groups(config))


def test_saved_files_compute_what_the_student_computes(tmp_path: Path) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    distilled = amct.distill(model, student, config, images(), epochs=2)
    record = tmp_path / "record.txt"
    amct.save_distill_model(
        distilled, tmp_path / "net", images()[0], record, ["x"], ["y"], {"x": [0], "y": [0]}
    )
    x = images(seed=3)[0]
    with torch.no_grad():
        expected = distilled(x).numpy()
    fake = onnxruntime.InferenceSession(str(tmp_path / "net_fake_quant_model.onnx"))
    deploy = amct.DeploySession(str(tmp_path / "net_deploy_model.onnx"))
    for session in (fake, deploy):
        # Sums of float32 between the layers are ordered differently.
        np.testing.assert_allclose(
            session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5
        )
    factors = read_record(record).factors
    assert set(factors) == set(retrain_layers(distilled))
    for name, layer in retrain_layers(distilled).items():
        assert (factors[name].scale_d, factors[name].offset_d) == layer.input_quantizer.factors()
    blocks = json.loads((tmp_path / "net_ledger.json").read_text())["blocks"]
    assert [block["layers"] for block in blocks] == _groups(config)
    assert all(block["loss_after"] <= block["loss_before"] for block in blocks)


def test_a_record_without_a_name_goes_under_amct_log(tmp_path: Path) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    distilled = amct.distill(model, student, config, images())
    amct.save_distill_model(distilled, "out/net", images()[0])
    text = Path("amct_log/distill_record.txt").read_text()
    assert "scale_d" in text
    # Only what is not the default is said.
    assert "act_type" not in text
    assert text.count("wts_type") == text.count('wts_type: "INT4"') > 0
    assert read_record("amct_log/distill_record.txt").factors["first"].activation_bits == 8


def test_layers_that_are_not_quantized_are_distilled_all_the_same(tmp_path: Path) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path, FOUR_BITS + 'quant_skip_layers: "second"')
    assert "second" not in retrain_layers(student)
    distilled = amct.distill(model, student, config, images(), epochs=10)
    second = next(o for o in distilled.outcomes if o.layers == ["second"])
    assert second.loss_after < 0.9 * second.loss_before
    assert not torch.equal(distilled.second.weight, model.second.weight)


def test_a_block_of_the_users_own(tmp_path: Path) -> None:
    model = mixed()
    cfg = FOUR_BITS + 'distill_group { start_layer_name: "first" end_layer_name: "second" }'
    student, config = student_of(model, tmp_path, cfg)
    assert _groups(config) == [["stem.0"], ["first", "second"], ["up"], ["head"]]
    distilled = amct.distill(model, student, config, images(), epochs=5)
    assert distilled.outcomes[1].loss_after < distilled.outcomes[1].loss_before


def test_larger_groups_and_the_disk(tmp_path: Path) -> None:
    model = mixed()
    in_memory, config = student_of(model, tmp_path, FOUR_BITS + "group_size: 2")
    assert ["first", "second"] in _groups(config)
    expected = amct.distill(model, in_memory, config, images(), epochs=2)
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "data_dump": True}))
    on_disk = amct.distill(model, in_memory, config, images(), epochs=2)
    for (name, a), b in zip(
        expected.state_dict().items(), on_disk.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


class ThreeD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=1)
        self.out = nn.Conv3d(4, 2, 1)

    def forward(self, volume: Tensor, mask: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(volume))) * mask


class Volumes(DistillSampleBase):
    @staticmethod
    def get_model_input_data(batch: Any) -> Any:
        return batch["image"], batch["mask"]


def volumes() -> Iterator[dict[str, Any]]:
    chance = torch.Generator().manual_seed(0)
    for size in (4, 4, 3):  # The last batch is smaller.
        image = F.interpolate(torch.randn(size, 1, 2, 2, 2, generator=chance), (4, 4, 4))
        yield {"image": image, "mask": torch.ones(1), "label": ["a"] * size}


def test_three_dimensions_a_sample_class_and_a_smaller_last_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ThreeD().eval()
    batch = next(volumes())
    student, config = student_of(model, tmp_path, inputs=(batch["image"], batch["mask"]))
    distilled = amct.distill(
        model, student, config, volumes(), epochs=10, sample_instance=Volumes()
    )
    assert [o.layers for o in distilled.outcomes] == [["conv"], ["out"]]
    assert distilled.outcomes[0].loss_after < distilled.outcomes[0].loss_before
    # Its inputs have no zero point.
    assert distilled.conv.input_quantizer.factors()[1] == 0


@pytest.mark.parametrize(
    "loader",
    [
        lambda: images(),
        lambda: [(x, torch.zeros(16)) for x in images()],
        lambda: [{"x": x, "labels": torch.zeros(16)} for x in images()],
    ],
    ids=["tensors", "with-labels", "dicts"],
)
def test_what_loaders_yield(tmp_path: Path, loader: Callable[[], list[Any]]) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    distilled = amct.distill(model, student, config, loader())
    expected = amct.distill(model, student, config, images())
    with torch.no_grad():
        assert torch.equal(distilled(images()[0]), expected(images()[0]))


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD,
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=3e-3, betas=(0.8, 0.9)),
    ],
    ids=["class", "function", "instance"],
)
def test_optimizer_and_loss_of_the_users_own(tmp_path: Path, optimizer: Any) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append((output, target))
        return F.l1_loss(output, target)

    distilled = amct.distill(
        model, student, config, images(), epochs=3, lr=0.05, loss=loss, optimizer=optimizer
    )
    # Before, and for each epoch: the batches, and the loss after them.
    assert len(seen) == len(_groups(config)) * 4 * (1 + 2 * 3)
    assert any(o.loss_after < o.loss_before for o in distilled.outcomes)


def test_the_global_random_state_is_not_used(tmp_path: Path) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    amct.distill(model, student, config, images())
    assert torch.equal(torch.rand(3), expected)


def test_networks_that_cannot_be_run_in_parts_are_told(tmp_path: Path) -> None:
    class Custom(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.from_numpy(2 * x.numpy()))

    torch.manual_seed(0)
    model = Custom().eval()
    student, config = student_of(model, tmp_path)
    with pytest.raises(amct.AmctError, match="cannot be run block by block"):
        amct.distill(model, student, config, images())


def test_too_few_batches(tmp_path: Path) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path, FOUR_BITS + "batch_num: 9")
    with pytest.raises(CalibrationError, match=r"yields 4 batches.*batch_num is 9"):
        amct.distill(model, student, config, images())


class InPlaceBeside(nn.Module):
    """Two branches that run in turns; what the first block of one makes is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        a, b = self.one(x), self.two(x)
        b += 3
        return self.three(a) + b


def test_targets_are_those_before_a_change_in_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = InPlaceBeside().eval()
    student, config = student_of(model, tmp_path, FOUR_BITS + "group_size: 2")
    assert _groups(config) == [["stem"], ["one", "three"], ["two"]]
    distilled = amct.distill(model, student, config, images(), epochs=0)
    # The constant is not the block's to learn.
    assert distilled.outcomes[2].loss_before < 0.1


def test_another_loss_or_other_data_do_not_go_on_behind_an_interrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixed()
    student, config = student_of(model, tmp_path)
    train, calls = teach.train_block, list[int]()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    def run(scale: float, seed: int) -> None:
        amct.distill(
            model, student, config, images(seed=seed), loss=lambda a, b: F.mse_loss(a, b) * scale
        )

    monkeypatch.setattr(teach, "train_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(1.0, 1)
    for scale, seed, trained in ((2.0, 1, 5), (1.0, 2, 5), (1.0, 1, 4)):
        calls[:] = [1, 1]
        run(scale, seed)
        assert len(calls) - 2 == trained
