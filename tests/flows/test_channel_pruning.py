"""Channel pruning as a flow: what a config asks for, records, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

import amct_pytorch as amct
from amct_pytorch.flows.channel_pruning import channel_graph, kept_ledger
from amct_pytorch.graph.look import look_at
from amct_pytorch.graph.tensors import ModelInputs
from amct_pytorch.record.attributes import attribute
from amct_pytorch.record.record_file import read_record
from amct_pytorch.report.html import write_report
from amct_pytorch.report.network import Network

BLOCK = "filter_pruner {{ balanced_l2_norm_filter_prune {{ prune_ratio: {} {} }} }}"
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def asking(ratio: float, options: str = "ascend_optimized: false") -> str:
    return f"prune_config {{ {BLOCK.format(ratio, options)} }}\n"


class Small(nn.Module):
    """A residual pair, then a layer of 20 channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.side = nn.Conv2d(width, width, 3, padding=1)
        self.wide = nn.Conv2d(width, 20, 1)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.wide(x + self.side(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def prune(model: nn.Module, folder: Path, cfg: str) -> nn.Module:
    (folder / "prune.cfg").write_text(cfg)
    return amct.create_prune_retrain_model(model, X, folder / "prune.cfg", folder / "record.txt")


@pytest.mark.parametrize(
    ("options", "kept"), [("ascend_optimized: false", 15), ("ascend_optimized: true", 16), ("", 16)]
)
def test_twenty_channels_and_a_quarter(
    model: nn.Module, tmp_path: Path, options: str, kept: int
) -> None:
    assert prune(model, tmp_path, asking(0.25, options)).wide.out_channels == kept


def test_rounding_that_leaves_nothing_to_prune_is_told(
    model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pruned = prune(model, tmp_path, asking(0.25, "ascend_optimized: true"))
    assert pruned.stem.out_channels == 8
    assert "6 of 8 channels would stay; rounded up to a multiple of 16 all do" in caplog.text
    ledger = kept_ledger(pruned)
    assert ledger is not None
    assert (ledger.groups[0].kept, ledger.groups[0].total) == (8, 8)


def test_a_group_takes_the_least_ratio_of_its_layers(model: nn.Module, tmp_path: Path) -> None:
    override = f'override_layer_configs {{ layer_name: "side" {asking(0.25)} }}'
    pruned = prune(model, tmp_path, asking(0.5) + override)
    assert (pruned.stem.out_channels, pruned.side.out_channels) == (6, 6)
    assert pruned.wide.out_channels == 10


def test_a_group_with_a_skipped_layer_stays_whole(model: nn.Module, tmp_path: Path) -> None:
    pruned = prune(model, tmp_path, asking(0.5) + 'regular_prune_skip_layers: "side"')
    assert pruned.stem.out_channels == 8
    assert pruned.wide.out_channels == 10
    ledger = kept_ledger(pruned)
    assert ledger is not None
    assert ledger.groups[0].reason == "side is one of them: the config skips it"


def test_the_channels_with_the_least_balanced_norms_go(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        # Norms along the first weight 1 2 3 4, along the second 4 3 2 1, but in the second they
        # differ little in size; balanced, 1 + 0, 2/3 + 1/3, … would tie: so shift one of them.
        model[0].weight.copy_(torch.tensor([1.0, 2, 3, 9])[:, None, None, None].expand(4, 3, 1, 1))
        model[2].weight.copy_(torch.tensor([4.0, 3, 2, 1])[None, :, None, None].expand(2, 4, 1, 1))
    # By hand: (0, 1/8, 2/8, 1) + (1, 2/3, 1/3, 0) = 1, 0.79, 0.58, 1.
    pruned = prune(model, tmp_path, asking(0.5))
    assert torch.equal(pruned[0].weight, model[0].weight[[0, 3]])
    assert torch.equal(pruned[2].weight, model[2].weight[:, [0, 3]])
    assert torch.equal(pruned[0].bias, model[0].bias[[0, 3]])


def test_record_is_that_of_the_format(model: nn.Module, tmp_path: Path) -> None:
    prune(model, tmp_path, asking(0.5))
    first, second = read_record(tmp_path / "record.txt").message.prune_record
    assert [node.name for node in first.producer] == ["stem", "side"]
    assert [node.name for node in first.consumer] == ["bn", "side", "wide"]
    kinds = [attribute(node, "type") for node in (*first.producer, *first.consumer)]
    assert kinds == ["Conv", "Conv", "BatchNormalization", "Conv", "Conv"]
    assert [attribute(node, "prune_axis") for node in first.producer] == [0, 0]
    assert [attribute(node, "prune_axis") for node in first.consumer] == [None, 1, 1]
    for node in (*first.producer, *first.consumer):
        assert (attribute(node, "begin"), attribute(node, "end")) == (0, 8)
    index = attribute(first.producer[0], "prune_index")
    assert len(index) == 4
    assert index == attribute(first.producer[1], "prune_index")
    assert attribute(second.consumer[0], "type") in ("Gemm", "MatMul")


def test_records_with_older_names_are_accepted(model: nn.Module, tmp_path: Path) -> None:
    pruned = prune(model, tmp_path, asking(0.5))
    record = tmp_path / "record.txt"
    text = record.read_text()
    older_names = {
        '"BatchNormalization"': '"FusedBatchNormV3"', '"Conv"': '"Conv2d"', '"Gemm"': '"Linear"',
    }  # fmt: skip
    for newer, older in older_names.items():
        text = text.replace(newer, older)
    record.write_text(text)
    torch.save({"net": {f"module.{k}": v for k, v in pruned.state_dict().items()}}, tmp_path / "p")
    restored = amct.restore_prune_retrain_model(
        model, X, record, tmp_path / "prune.cfg", tmp_path / "p", "net"
    )
    assert torch.equal(restored(X), pruned(X))


def test_hooks_mode_device_and_the_users_model_stay(model: nn.Module, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    model.stem.register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape)))
    model.train()
    model.bn.eval()
    model.head.bias.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    pruned = prune(model, tmp_path, asking(0.5))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    seen.clear()
    pruned(X)
    assert seen == [(2, 4, 8, 8)]
    assert pruned.training
    assert not pruned.bn.training
    assert pruned.head.weight.requires_grad
    assert not pruned.head.bias.requires_grad


def test_parameters_can_be_given_to_an_optimizer(model: nn.Module, tmp_path: Path) -> None:
    pruned = prune(model, tmp_path, asking(0.5)).train()
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(pruned(X), torch.tensor([0, 3]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model: nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "prune.cfg").write_text(asking(0.5))
    pruned = amct.create_prune_retrain_model(
        model.to(dtype), X.to(dtype), tmp_path / "prune.cfg", tmp_path / "record.txt"
    )
    assert pruned.wide.weight.dtype == dtype
    assert pruned.wide.weight.shape == (10, 4, 1, 1)


def test_a_group_prints_itself(model: nn.Module) -> None:
    inputs = ModelInputs.of(X)
    graph = channel_graph(model, inputs, look_at(model, inputs))
    text = str(graph.groups[0])
    assert text.startswith("group 0: 8 channels of stem, side")
    assert re.search(r"producer +side.weight axis 0 +Conv, channels 0-7", text)
    assert re.search(r"follower +bn.weight axis 0 +BatchNormalization, channels 0-7", text)
    assert re.search(r"consumer +wide.weight axis 1 +Conv, channels 0-7", text)
    assert "stays whole: it is the model's output" in str(graph.groups[-1])


def test_ledger_counts_what_is_there(model: nn.Module, tmp_path: Path) -> None:
    pruned = prune(model, tmp_path, asking(0.5))
    ledger = kept_ledger(pruned)
    assert ledger is not None
    assert ledger.parameters[1] == sum(p.numel() for p in pruned.parameters())
    layers = {layer.name: layer for layer in ledger.layers}
    # 2 · images · positions · out · in · kernel
    assert layers["side"].flops == (2 * 2 * 64 * 8 * 8 * 9, 2 * 2 * 64 * 4 * 4 * 9)
    assert layers["head"].flops == (2 * 2 * 20 * 4, 2 * 2 * 10 * 4)
    assert (layers["side"].status, layers["head"].status) == ("pruned", "followed")
    assert layers["head"].reason == "it is the model's output"
    assert ledger.milliseconds is not None


def test_the_report_draws_the_pruned_network(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    amct.save_prune_retrain_model(prune(model, tmp_path, asking(0.5)), tmp_path / "net", X)
    ledger = json.loads((tmp_path / "net_ledger.json").read_text())
    network = TypeAdapter(Network).validate_python(ledger["network"])
    assert network.sources() == {
        "stem": [], "side": ["stem"], "wide": ["side", "stem"], "head": ["wide"]
    }  # fmt: skip
    write_report(tmp_path / "net_ledger.json", tmp_path / "net.html")
    page = (tmp_path / "net.html").read_text()
    assert "<svg" in page
    assert "8 → 4" in page


TWO_OF_FOUR = "n_out_of_m_pruner { l1_selective_prune { n_out_of_m_type: M4N2 } }"


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (asking(0), r"prune_ratio is 0\.?0?; allowed: a number in \(0, 1\)"),
        (asking(1), r"prune_ratio is 1\.?0?; allowed: a number in \(0, 1\)"),
        (asking(-0.5), "prune_ratio is -0.5"),
        (asking(0.5) + 'regular_prune_skip_layers: "sten"', "did you mean 'stem'"),
        (
            asking(0.5) + f'override_layer_configs {{ layer_name: "side" prune_config {{ '
            f"{TWO_OF_FOUR} }} }}",
            "one kind in a file",
        ),
        (
            asking(0.5) + f'override_layer_configs {{ layer_name: "head" {asking(0.5)} }}',
            "head cannot be pruned: it is the model's output",
        ),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(
    model: nn.Module, tmp_path: Path, cfg: str, message: str
) -> None:
    with pytest.raises(amct.AmctError, match=message):
        prune(model, tmp_path, cfg)
    assert not (tmp_path / "record.txt").exists()


def restored(model: nn.Module, folder: Path) -> nn.Module:
    torch.save({}, folder / "p.pth")
    return amct.restore_prune_retrain_model(
        model, X, folder / "record.txt", folder / "prune.cfg", folder / "p.pth"
    )


class Renamed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.other, self.side = self.side, None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.head(F.relu(self.wide(x + self.other(x))).mean((2, 3)))


class Uncoupled(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.side(F.relu(self.bn(self.stem(x))))
        return self.head(F.relu(self.wide(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Small(12), "stem has channels 0 to 8 here, which is 8; in the model 12"),
        (Renamed, "side: the model has no such layer"),
        (Uncoupled, r"prune_record\[0\]: stem and side make the same channels here"),
    ],
)
def test_record_of_another_model_names_the_first_difference(
    model: nn.Module, tmp_path: Path, other: type[nn.Module], message: str
) -> None:
    prune(model, tmp_path, asking(0.5))
    with pytest.raises(amct.AmctError, match=message):
        restored(other().eval(), tmp_path)


def test_record_that_takes_only_some_of_what_hangs_together(
    model: nn.Module, tmp_path: Path
) -> None:
    prune(model, tmp_path, asking(0.5))
    record = tmp_path / "record.txt"
    text = record.read_text()
    removed = re.search(r"\n +ints: (\d+)", text)
    assert removed is not None
    record.write_text(text.replace(removed.group(0), "", 1))
    with pytest.raises(amct.AmctError, match=r"channel \d hangs together with \['side'\]"):
        restored(model, tmp_path)


def test_checkpoint_of_another_shape(model: nn.Module, tmp_path: Path) -> None:
    prune(model, tmp_path, asking(0.5))
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    with pytest.raises(amct.AmctError, match=r"stem\.weight"):
        amct.restore_prune_retrain_model(
            model, X, tmp_path / "record.txt", tmp_path / "prune.cfg", tmp_path / "whole.pth"
        )
