"""A small network of blocks, and layers that calibrate themselves as the flow's layers do."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from amct_pytorch.algorithms.gptq import GptqSettings
from amct_pytorch.algorithms.gptq_calibration import GptqCalibration
from amct_pytorch.algorithms.weight_grid import WeightGrid
from amct_pytorch.formats import FORMATS, Granularity, dequantize, fake_quantize, params_of

GRID = WeightGrid(FORMATS["int4"], Granularity("channel"))


class MinMaxLayer(nn.Module):
    """Rounds its weight to the nearest after `batch_num` batches; remembers what it saw."""

    def __init__(self, linear, batch_num):
        super().__init__()
        self.ori_module = linear
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.batch_num = batch_num
        self.batches_seen = 0
        self.inputs = []
        self.register_forward_hook(MinMaxLayer.count)

    def count(self, _, __):
        if not self.calibrated:
            self.batches_seen += 1

    @property
    def calibrated(self):
        return self.batches_seen >= self.batch_num

    def forward(self, x):
        output = F.linear(x, self.weight)
        if not self.calibrated:
            self.inputs.append(x.clone())
            self.observe(x)
            if self.batches_seen + 1 == self.batch_num:
                self.weight.data = self.solve()
        return output

    def observe(self, x):
        pass

    def solve(self):
        scale = params_of(self.weight, GRID.fmt, GRID.granularity).scale
        return fake_quantize(self.weight, scale, None, GRID.fmt, GRID.granularity)


class GptqLayer(MinMaxLayer):
    sequential = True

    def __init__(self, linear, batch_num):
        super().__init__(linear, batch_num)
        self.reference = None
        self.references = []
        self.calibration = GptqCalibration("layer", GptqSettings())

    def observe(self, x):
        self.references.append(self.reference)
        self.calibration.observe(x, self.reference)

    def solve(self):
        self.result = self.calibration.solve(self.weight, GRID)
        r = self.result
        return dequantize(r.codes, r.scale, r.offset, GRID.fmt, GRID.granularity)


class Block(nn.Module):
    """Two layers on one input, and one behind them; wants a shift from the model."""

    def __init__(self, width, returns_tuple):
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.returns_tuple = returns_tuple

    def forward(self, x, shift):
        y = F.layer_norm(x, x.shape[-1:]) + shift
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return (x, None) if self.returns_tuple else x


class Network(nn.Module):
    def __init__(self, width=12, depth=3, returns_tuple=False):
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, returns_tuple) for _ in range(depth))
        self.head = nn.Linear(width, 5, bias=False)

    def forward(self, x, attention_mask=None):
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = block(x, shift=0.1 * number)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


def network(layer, batch_num, skip=("first",), seed=0, **options):
    """The float network and one whose linear layers are `layer`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = Network(**options)
    changed = copy.deepcopy(plain)
    for name, module in list(changed.named_modules()):
        if isinstance(module, nn.Linear) and name not in skip:
            parent = changed.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer(module, batch_num))
    return plain, changed


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MinMaxLayer)}


def seen_inputs(model, batches, names):
    """What each named layer gets when the batches run through the model, joined."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x) for name, x in seen.items()}
